"""The benchmark: ``python -m bench``. Cases from the tests' table, rivals in processes of their own."""
