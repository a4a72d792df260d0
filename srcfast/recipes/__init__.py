"""How the two shipped checkpoints were made; no command of `srcfast` imports this."""
