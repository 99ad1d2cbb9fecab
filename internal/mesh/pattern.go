package mesh

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// CheckIDPattern accepts a SPIFFE ID or a segment pattern below a literal trust
// domain.
func CheckIDPattern(p string) error {
	rest, ok := strings.CutPrefix(p, "spiffe://")
	if !ok {
		return fmt.Errorf("%q is not a SPIFFE ID: it starts with spiffe://", p)
	}
	td, path, ok := strings.Cut(rest, "/")
	if strings.Contains(td, "*") {
		return fmt.Errorf("%q: the trust domain is written out, not as a pattern", p)
	}
	if _, err := spiffeid.TrustDomainFromString(td); err != nil {
		return fmt.Errorf("%q: %w", p, err)
	}
	if !ok {
		return fmt.Errorf("%q names a trust domain, not a workload: append /** for all of it", p)
	}
	if err := checkSegments(path); err != nil {
		return fmt.Errorf("%q: %w", p, err)
	}
	literal := strings.NewReplacer("**", "x", "*", "x").Replace(p)
	if _, err := spiffeid.FromString(literal); err != nil {
		return fmt.Errorf("%q: %w", p, err)
	}
	return nil
}

// checkSegments refuses wildcards that mean nothing.
func checkSegments(path string) error {
	segs := strings.Split(path, "/")
	for i, s := range segs {
		switch {
		case s == Any:
			if i != len(segs)-1 {
				return errors.New("** is only possible as the last segment")
			}
		case s == "*":
		case strings.Contains(s, "*"):
			return fmt.Errorf("segment %q: * stands for a whole segment, not for a part", s)
		}
	}
	return nil
}
