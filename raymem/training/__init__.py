"""Does one worker's work: recipe, data, model, step, loop, checkpoint. Nothing here imports Ray or MLflow."""
