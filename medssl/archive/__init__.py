"""Files to volumes: find, group into series, order, check, pseudonymise, manifest."""
