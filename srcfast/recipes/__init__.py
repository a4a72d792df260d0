"""How the two shipped checkpoints were made, and how the models of the study are; no command of `srcfast` imports this."""
