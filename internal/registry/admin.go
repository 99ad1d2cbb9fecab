package registry

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// JudgeAdmin decides an operator's call by the policies in force; see
// mesh.Policies.JudgeAdmin. Before the first nothing speaks of it.
func (r *Registry) JudgeAdmin(caller spiffeid.ID, method string, on spiffeid.ID) (mesh.Effect, string) {
	if acc := r.state.Load().accepted; acc != nil {
		return acc.Policies.JudgeAdmin(caller, method, on)
	}
	return "", ""
}

// MayAdmin reports whether a row allows caller the method on some identity.
func (r *Registry) MayAdmin(caller spiffeid.ID, method string) bool {
	acc := r.state.Load().accepted
	return acc != nil && acc.Policies.MayAdmin(caller, method)
}
