package proxy

import (
	"crypto/sha256"

	"sallyport/internal/authz"
)

// claims are what the token of a call says to the sidecar of its caller, where the
// route is chosen. They steer a call and allow none: the sidecar of the service
// judges by the same token.
type claims struct {
	looked bool
	token  *authz.Token
	// unknown says that the token could not be checked, so that nobody knows whose
	// call it is.
	unknown bool
}

// claim is the value of a claim of the call's token, and empty when it shows none
// that counts. The token is checked once, and only when a route asks.
func (d *door) claim(x *call, name string) string {
	c := &x.claims
	if !c.looked {
		c.looked = true
		x.show(x.host.textOf(x.known.name), "")
		if d.cfg.Leaf != nil {
			x.shown.Thumbprint = sha256.Sum256(d.cfg.Leaf())
		}
		t, f := d.cfg.Tokens.Check(x.ctx, &x.shown)
		c.token, c.unknown = t, f != nil && f.Status() == 503
	}
	if c.token == nil {
		return ""
	}
	return c.token.Claims[name]
}

// unchecked refuses a call that would go by a token which cannot be checked now.
// One that does not count has no claims, and the service refuses it.
func (x *call) unchecked() *refusal {
	if !x.claims.unknown {
		return nil
	}
	return &refusal{status: 503, reason: "credential", detail: "the token that the route is chosen by cannot be checked now"}
}
