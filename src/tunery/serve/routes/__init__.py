"""One router a resource."""

from tunery.serve.routes import completions, extras, files, jobs, models

ROUTERS = tuple(module.router for module in (files, jobs, models, completions, extras))
