"""An address becomes audio in the spool: `fetcher`, and a module for each kind of address."""
