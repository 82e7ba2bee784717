"""The reference training script: configuration, methods, Trainer, evaluation, reports. Needs the extra `train`."""
