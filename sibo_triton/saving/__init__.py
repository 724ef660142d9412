"""An adapter's files: its weights, which are refused without their lambda, and its model card."""
