"""Small models, made-up records and servers of processes that several tests share."""
