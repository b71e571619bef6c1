"""The suite, a package so that its rooms can share factories (`tests.checkpoints`) and fakes."""
