"""The same task on a server that trains models through OpenAI's API, and moving a model that was tuned there here."""
