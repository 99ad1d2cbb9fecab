package authz

import (
	"encoding/json"
	"fmt"
	"runtime/debug"
	"time"

	"sallyport/internal/jose"
	"sallyport/internal/mesh"
)

// A basis is what a Token was made from, to see whether it would still be.
type basis struct {
	jwt  *verified // of a token that an issuer signed
	hash string    // of an API key, as tokens.yaml has it
}

// Standing looks again at a credential that counted when a call began that goes
// on, and gives the Token as it counts now: nil without a fault when the
// policy in force does not look at such credentials any more, so that rows which
// ask for one do not hold. What binds it was proved on the same connection and
// is not asked for again. A token may have ended up to grace ago; what was
// revoked or taken away has none. It is quick and fetches nothing.
func (v *Verifier) Standing(t *Token, grace time.Duration) (now *Token, f *Fault) {
	st := v.state.Load()
	if st == nil || t == nil {
		return nil, nil
	}
	defer func() {
		if p := recover(); p != nil {
			v.cfg.Log.Error("looking at a credential again panicked; it does not count", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			now, f = nil, fault(FaultInternal, "looking at the credential again failed")
		}
	}()
	switch {
	case t.basis.jwt != nil && len(st.issuers) > 0:
		if f := v.standingJWT(st, t.basis.jwt, grace); f != nil {
			return nil, fault(f.Code, f.Detail+"; "+t.detail())
		}
		return t, nil
	case t.basis.hash != "" && st.keys != nil:
		k := st.keys.byHash[t.basis.hash]
		if k == nil || k.name != t.Subject || k.ended(v.cfg.Now()) {
			return nil, fault(FaultAPIKey, "API key was taken away or has ended; "+t.detail())
		}
		return k.token, nil
	case t.basis == basis{}:
		return nil, fault(FaultInternal, "nobody has verified the credential")
	}
	return nil, nil
}

func (v *Verifier) standingJWT(st *verifierState, e *verified, grace time.Duration) *Fault {
	is := st.issuers[e.issuer.name]
	switch {
	case is == nil:
		return fault(FaultIssuer, "token is of an issuer that does not count here any more")
	case is.rules != e.issuer.rules:
		return fault(FaultClaims, "tokens of its issuer are held to other rules than before")
	case !v.cfg.Now().Before(e.ends.Add(grace)):
		return fault(FaultExpired, "token has expired")
	case st.revoked != nil && st.revoked[is.name].holds(e):
		return fault(FaultRevoked, "token was revoked")
	case !v.cfg.Keys.Has(is.name, &e.names, e.key):
		return fault(FaultKey, fmt.Sprintf("issuer %q does not have the key any more", is.name))
	}
	return nil
}

// rulesOf is the part of an issuer's entry that says which tokens count.
func rulesOf(cfg mesh.TokenIssuer) (string, error) {
	cfg.Keys, cfg.Services, cfg.Headers, cfg.Forward, cfg.Origin = mesh.KeySet{}, nil, nil, false, mesh.Origin{}
	b, err := json.Marshal(cfg)
	return string(b), err
}

// ended says that an API key has come to its end.
func (k *apiKey) ended(now time.Time) bool { return !k.until.IsZero() && !now.Before(k.until) }

// namesOf is what of a token chooses its key.
func namesOf(t *jose.Token) jose.Token { return jose.Token{Alg: t.Alg, KeyID: t.KeyID} }
