"""Runs in MLflow; nothing here imports mlflow before it is used."""
