package svid

import (
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
)

// A Group is a key exchange that handshakes may use.
type Group tls.CurveID

// groupNames are the groups that can be set, the most careful first.
var groupNames = []struct {
	group Group
	name  string
}{
	{Group(tls.X25519MLKEM768), "x25519mlkem768"}, {Group(tls.X25519), "x25519"}, {Group(tls.CurveP256), "p256"},
}

// UnmarshalText reads the name of a group.
func (g *Group) UnmarshalText(text []byte) error {
	var known []string
	for _, n := range groupNames {
		if n.name == string(text) {
			*g = n.group
			return nil
		}
		known = append(known, n.name)
	}
	return fmt.Errorf("key exchange %q is not known; write some of %s", text, strings.Join(known, ", "))
}

// MarshalText writes the name of a group.
func (g Group) MarshalText() ([]byte, error) {
	for _, n := range groupNames {
		if n.group == g {
			return []byte(n.name), nil
		}
	}
	return nil, fmt.Errorf("key exchange %d has no name", g)
}

// Exchange has the TLS settings made of s from now on allow these groups only;
// none for the default, all that have a name. The order says nothing: both ends
// take the hybrid with ML-KEM if they may, since connections live long, and
// x25519 before p256.
func (s *Source) Exchange(groups []Group) {
	if len(groups) == 0 {
		s.groups.Store(nil)
		return
	}
	groups = slices.Clone(groups)
	s.groups.Store(&groups)
}

func (s *Source) curves() (out []tls.CurveID) {
	if set := s.groups.Load(); set != nil {
		for _, g := range *set {
			out = append(out, tls.CurveID(g))
		}
		return out
	}
	for _, n := range groupNames {
		out = append(out, tls.CurveID(n.group))
	}
	return out
}
