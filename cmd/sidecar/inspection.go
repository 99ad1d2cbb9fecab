package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/proxy"
)

// inspectionEvery is how often a gateway is asked by whom it stands in for hosts.
const inspectionEvery = 5 * time.Second

// keepInspection keeps the file by which the workload trusts a gateway that stands
// in for hosts, until ctx ends. Without such hosts there is none.
func (s *sidecar) keepInspection(ctx context.Context) error {
	file := s.cfg.Egress.Inspection
	if file == "" || s.gateways == nil {
		return nil
	}
	known, said := []byte(nil), ""
	for ; ctx.Err() == nil; daemon.Pause(ctx, inspectionEvery) {
		pem, err := proxy.InspectionCA(ctx, s.gateways)
		switch {
		case err != nil || known != nil && bytes.Equal(pem, known):
		case len(pem) == 0:
			if err = os.Remove(file); errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
		default:
			if err = constrained(pem); err != nil {
				break
			}
			err = daemon.WriteFile(file, pem, 0o644) // it is no secret, and for the workload to read
		}
		switch {
		case err == nil:
			known, said = append([]byte{}, pem...), ""
		case ctx.Err() == nil && err.Error() != said:
			said = err.Error()
			s.log.Warn("certificate for inspection is not kept up to date", "file", file, "err", err)
		}
	}
	return nil
}

// constrained refuses an authority that could speak for every host: the workload
// trusts what is in its file for all that it does.
func constrained(pem []byte) error {
	list, err := mesh.ParseCA(string(pem))
	if err != nil {
		return fmt.Errorf("what the gateway stands in by %w", err)
	}
	for _, c := range list {
		all := func(name string) bool { return strings.Trim(name, ".") == "" }
		if !c.PermittedDNSDomainsCritical || len(c.PermittedDNSDomains) == 0 || slices.ContainsFunc(c.PermittedDNSDomains, all) {
			return fmt.Errorf("the gateway stands in by %q, which is not constrained to names: it is not passed on to the workload", c.Subject.CommonName)
		}
	}
	return nil
}
