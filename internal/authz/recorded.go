package authz

import (
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

// A Recorded is the account of a decision of which only the record is left.
type Recorded struct {
	Why
	// DecidedBy is the policy revision that decided; the rows of the account
	// are those of Revision.
	DecidedBy uint64 `json:"decided_by,omitempty"`
	// Conds are the conditions of the row that allowed the call.
	Conds string `json:"conds,omitempty"`
	// Detail is what the record says beside.
	Detail string `json:"detail,omitempty"`
	// Counted is how many calls the record counts together, 0 when it is of
	// one; their paths are told as a template.
	Counted uint64 `json:"counted,omitempty"`
	// Log names the log that the record is in.
	Log string `json:"log,omitempty"`
}

// unkept stands for what a record does not have.
const unkept = "not in the record"

// Recorded explains a decision by its record. What was decided is what the
// record says; the rows are those of s. A record has neither the token nor the
// server name nor the environment, so that conditions on them are left open.
func (s *Set) Recorded(r *audit.Record) Recorded {
	out := Recorded{
		Why:       Why{ID: r.ID, Time: r.Time, Account: Account{Allow: r.Decision == audit.Allow, Dir: r.Dir, Identity: r.Src, Dst: r.Dst, Port: r.Port, Verb: r.Verb, Path: r.Path}},
		DecidedBy: r.Revision, Detail: r.Detail,
	}
	if r.Kind == audit.KindRollup {
		out.Counted = r.Count
	}
	src, err := spiffeid.FromString(r.Src)
	if err == nil && out.Counted == 0 {
		a := s.Account(&Call{Dir: mesh.Direction(r.Dir), Src: src, Dst: r.Dst, Port: r.Port, Verb: r.Verb, Path: r.Path, Now: r.Time})
		a.Allow = out.Allow
		out.Account = a
	}
	out.Reason, out.Rule, out.Origin, out.Revision = Reason(r.Reason), r.Rule, "", s.Revision()
	for i := range out.Tried {
		out.Tried[i].open()
	}
	if out.Nearest != nil {
		out.Nearest.open()
	}
	if s.Len() > 0 {
		out.byRule(s)
	}
	if out.Allow {
		out.Nearest, out.Add, out.NoAdd = nil, "", ""
	}
	return out
}

// Unrecordable explains a refusal by the gap record that counts it: what was
// asked is not in it.
func Unrecordable(id string, gap *audit.Record) Recorded {
	out := Recorded{Why: Why{ID: id, Time: gap.Time}, Detail: gap.Detail}
	out.unrecorded("no row would have helped, the record of the call could not be kept")
	return out
}

// byRule says where the row that decided is written. It fitted the call.
func (x *Recorded) byRule(s *Set) {
	at := slices.IndexFunc(s.rows, func(r mesh.Rule) bool { return r.ID == x.Rule })
	if at < 0 || x.Rule == "" {
		return
	}
	row := &s.rows[at]
	if row.Origin.File != "" {
		x.Origin = row.Origin.String()
	}
	if !x.Allow || row.Effect != mesh.Allow {
		return
	}
	x.Conds = row.Cond
	for i := range x.Tried {
		if t := &x.Tried[i]; t.Rule == row.ID && t.Got == unkept {
			t.Field, t.Want, t.Got = "", "", ""
		}
	}
}

// open leaves open a condition that hangs on what a record does not have.
func (t *Tried) open() {
	if t.Field != FieldCond {
		return
	}
	conds, err := mesh.ParseCond(t.Want)
	if err != nil || len(conds) != 1 {
		return
	}
	if w := &conds[0]; w.NeedsToken() || w.Word == mesh.CondSNI || w.Word == mesh.CondEnv {
		t.Got = unkept
	}
}
