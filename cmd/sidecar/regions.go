package main

import (
	"fmt"

	"sallyport/internal/region"
)

// openRegions reads the databases that say where addresses are.
func (s *sidecar) openRegions() (err error) {
	if s.regions, err = region.Open(s.cfg.Regions, s.log); err != nil {
		err = fmt.Errorf("regions.%w", err)
	}
	return err
}
