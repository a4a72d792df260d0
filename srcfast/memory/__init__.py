"""Memory and work: what a model, a forest and a stage take, forecast and measured."""
