"""The benchmark protocol: arms x numbers of labels x seeds under equal terms, as one command that can be resumed."""
