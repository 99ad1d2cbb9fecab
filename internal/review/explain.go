package review

import (
	"fmt"
	"slices"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// An Explained call is how it is decided, and the calls that are decided with
// it.
type Explained struct {
	authz.Account
	// Conds are the conditions of the row that allowed the call; "-" for none.
	Conds string `json:"conds,omitempty"`
	// Way is how a call to a host outside goes out.
	Way *Way `json:"way,omitempty"`
	// Among is the set of allowed calls that this one is of.
	Among *Reach `json:"among,omitempty"`
}

// Explain says how the policies decide a call.
func Explain(p *mesh.Policies, c *authz.Call) (Explained, error) {
	snap, err := mesh.Compile(p, 0, 0, nil)
	if err != nil {
		return Explained{}, err
	}
	set, err := authz.Compile(snap)
	if err != nil {
		return Explained{}, err
	}
	judged := *c
	c = &judged
	c.Port = judgedPort(p.Destinations, c)
	x := Explained{Account: set.Account(c), Way: wayOf(snap, c)}
	if i := slices.IndexFunc(p.Rules, func(r mesh.Rule) bool { return r.ID == x.Rule }); i >= 0 && x.Allow {
		x.Conds = p.Rules[i].Cond
	}
	if x.Reason == authz.BadRequest {
		return x, nil
	}
	rs, err := reach(p, map[dimension]string{byDir: string(c.Dir), bySrc: c.Src.String(), byDst: c.Dst}, byDst, nil, c.Now)
	if err != nil {
		return Explained{}, err
	}
	for i := range rs {
		if rs[i].Covers(c) {
			x.Among = &rs[i]
		}
	}
	if (x.Among != nil) != x.Allow {
		return Explained{}, fmt.Errorf("the judge and the comparison of rows do not agree on this call, which is a defect of Sallyport: please report it")
	}
	return x, nil
}
