package registry_test

import (
	"sallyport/internal/control"
	"sallyport/internal/registry"
)

var (
	_ control.Registry = (*registry.Registry)(nil)
	_ control.Keeper   = (*registry.Registry)(nil)
)
