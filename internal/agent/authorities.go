package agent

import (
	"crypto/x509"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"sallyport/internal/mesh"
	"sallyport/internal/svid"
)

// tainted has the node's identity renewed when it stands under a tainted root.
func (a *Agent) tainted(t svid.Trust) {
	id, err := a.nodeIdentity()
	if err != nil || !t.Taints(id) {
		return
	}
	select {
	case a.renewNow <- struct{}{}:
	default: // it is asked for already
	}
}

// anyValid says whether a root of a bundle has not expired.
func anyValid(b *x509bundle.Bundle) bool {
	return b != nil && slices.ContainsFunc(b.X509Authorities(), func(c *x509.Certificate) bool { return time.Now().Before(c.NotAfter) })
}

// keepBundle remembers the bundle beside identities that have all expired: the
// roots may have changed since the bootstrap file was made.
func (a *Agent) keepBundle(path string) {
	if b, err := svid.LoadBundle(path); err == nil && b.TrustDomain() == a.cfg.TrustDomain {
		a.kept = b
	}
}

// authorities says what this proxy trusts and shows while the roots change.
func (a *Agent) authorities() *mesh.Authorities {
	st := a.held.Current()
	if st == nil {
		return nil
	}
	out := &mesh.Authorities{}
	for _, root := range st.Bundle.X509Authorities() {
		out.Trusts = append(out.Trusts, mesh.RootID(root.Raw))
	}
	for kid := range st.JWTKeys {
		out.Trusts = append(out.Trusts, kid)
	}
	shown := slices.Clone(st.Identities)
	if node, err := a.nodeIdentity(); err == nil {
		shown = append(shown, node)
	}
	for _, id := range shown {
		if root := id.Root(st.Bundle); root != nil {
			out.Shows = append(out.Shows, mesh.RootID(root.Raw))
		}
	}
	slices.Sort(out.Trusts)
	slices.Sort(out.Shows)
	out.Shows = slices.Compact(out.Shows)
	return out
}
