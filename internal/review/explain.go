package review

import (
	"fmt"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// An Explained call is how it is decided, and the calls that are decided with
// it.
type Explained struct {
	authz.Account
	// Among is the set of allowed calls that this one is of.
	Among *Reach `json:"among,omitempty"`
}

// Explain says how the policies decide a call.
func Explain(p *mesh.Policies, c *authz.Call) (Explained, error) {
	set, err := judgeOf(p)
	if err != nil {
		return Explained{}, err
	}
	x := Explained{Account: set.Account(c)}
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
