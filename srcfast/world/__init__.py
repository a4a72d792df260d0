"""The embedded world: scenes, questions, true rationales, and the oracle that checks any rationale."""
