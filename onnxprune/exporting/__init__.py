"""The model as it is handed over: tidied, in smaller numbers, in other formats."""
