package authz

import (
	"slices"
	"strings"
	"time"

	"sallyport/internal/mesh"
)

// failedCond returns the first condition that does not hold for the call, nil
// when all hold. Conditions on tokens never hold without a token; words that
// are unknown here never hold.
func failedCond(conds []mesh.Cond, c *Call) *mesh.Cond {
	for i := range conds {
		if !holds(&conds[i], c) {
			return &conds[i]
		}
	}
	return nil
}

func holds(w *mesh.Cond, c *Call) bool {
	if w.NeedsToken() {
		return c.Token != nil && holdsToken(w, c.Token)
	}
	switch w.Word {
	case mesh.CondEnv:
		return w.Value != "" && c.Environment == w.Value
	case mesh.CondSNI:
		host, ok := strings.CutPrefix(c.Dst, "host:")
		return ok && host != "" && c.SNI == host
	case mesh.CondWhen, mesh.CondUntil:
		now := c.Now
		if now.IsZero() {
			now = time.Now()
		}
		return w.Within(now)
	case mesh.CondUnlessSrc:
		return !mesh.MatchSrc(w.Value, c.Src.String())
	}
	return false
}

func holdsToken(w *mesh.Cond, t *Token) bool {
	switch w.Word {
	case mesh.CondIssuer:
		return w.Value != "" && t.Issuer == w.Value
	case mesh.CondAudience:
		return slices.Contains(t.Audience, w.Value)
	case mesh.CondScope:
		return t.Scopes[w.Value]
	case mesh.CondClaim:
		v, ok := t.Claims[w.Key]
		return ok && v != "" && v == w.Value
	case mesh.CondACR:
		return t.ACR >= w.Level
	case mesh.CondBound:
		return t.Bound
	}
	return false
}

// reasonFor names the reason of a call that only the condition kept from being
// allowed.
func reasonFor(w *mesh.Cond) Reason {
	if w.NeedsToken() {
		return FailedToken
	}
	return FailedCond
}
