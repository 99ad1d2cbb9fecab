package authz

import (
	_ "embed"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"

	"github.com/casbin/casbin/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

//go:embed admin.conf
var adminModel string

// What Casbin must have understood of the model, byte for byte.
var adminWant = map[string]string{
	"r": "caller, method, on", "p": "id, caller, method, on, eft", "e": wantEffect,
	"m": "callerOK(r_caller, p_caller) && methodOK(r_method, p_method, p_eft) && onOK(r_on, p_on)",
}

// Admins judges calls of operators by the rows of admin.csv. Casbin decides each
// one: such calls are rare. What it cannot decide is denied.
type Admins struct {
	policies func() *mesh.Policies
	log      *slog.Logger
	built    atomic.Pointer[adminSet]
}

// An adminSet is the rows of one set of policies. It is immutable.
type adminSet struct {
	of *mesh.Policies
	// rows has all rows, somewhere the allow rows on whatever identity; nil
	// when there are none.
	rows, somewhere *casbin.Enforcer
	err             error
}

// NewAdmins judges by the policies in force, nil before the first. Log receives
// why Casbin could not decide.
func NewAdmins(policies func() *mesh.Policies, log *slog.Logger) *Admins {
	return &Admins{policies: policies, log: log}
}

// JudgeAdmin decides an operator's call: the effect and the row, or nothing when
// no row speaks of it. Deny overrides. The zero caller is the local user, the
// zero identity a call that concerns none in particular.
func (a *Admins) JudgeAdmin(caller spiffeid.ID, method string, on spiffeid.ID) (mesh.Effect, string) {
	set := a.current()
	if set.err == nil && set.rows == nil {
		return "", ""
	}
	ok, rule, err := set.ask(set.rows, caller, method, on.String())
	switch {
	case err != nil:
		a.log.Error("operator's call denied: its right cannot be judged", "method", method, "error", err)
		return mesh.Deny, ""
	case ok:
		return mesh.Allow, rule
	case rule != "":
		return mesh.Deny, rule
	}
	return "", ""
}

// MayAdmin reports whether a row allows caller the method on some identity.
func (a *Admins) MayAdmin(caller spiffeid.ID, method string) bool {
	set := a.current()
	if set.err == nil && set.somewhere == nil {
		return false
	}
	ok, _, err := set.ask(set.somewhere, caller, method, "")
	if err != nil {
		a.log.Error("operator's call denied: its right cannot be judged", "method", method, "error", err)
	}
	return ok && err == nil
}

func (a *Admins) current() *adminSet {
	p := a.policies()
	if set := a.built.Load(); set != nil && set.of == p {
		return set
	}
	set := &adminSet{of: p}
	if p != nil {
		var allows []mesh.AdminRule
		for _, r := range p.Admin {
			if r.Effect == mesh.Allow {
				r.On = mesh.Any
				allows = append(allows, r)
			}
		}
		if set.rows, set.err = adminEnforcer(p.Admin); set.err == nil {
			set.somewhere, set.err = adminEnforcer(allows)
		}
	}
	a.built.Store(set)
	return set
}

// adminEnforcer is nil for no rows: Casbin would judge an empty policy by a row
// of empty fields.
func adminEnforcer(rows []mesh.AdminRule) (*casbin.Enforcer, error) {
	if len(rows) == 0 {
		return nil, nil
	}
	m, err := parseModel(adminModel, adminWant)
	if err != nil {
		return nil, fmt.Errorf("admin.csv: %w", err)
	}
	for _, r := range rows {
		if r.Effect != mesh.Allow && r.Effect != mesh.Deny {
			return nil, fmt.Errorf("%s: row %s: effect %q is neither allow nor deny", r.Origin, r.ID, r.Effect)
		}
		if err := loadRow(m, []string{r.ID, r.Caller, r.Method, r.On, string(r.Effect)}); err != nil {
			return nil, fmt.Errorf("%s: row %s: %w", r.Origin, r.ID, err)
		}
	}
	if n := len(m["p"]["p"].Policy); n != len(rows) {
		return nil, fmt.Errorf("admin.csv: casbin kept %d of %d rows", n, len(rows))
	}
	e, err := casbin.NewEnforcer(m)
	if err != nil {
		return nil, fmt.Errorf("admin.csv: start casbin: %w", err)
	}
	e.AddFunction("callerOK", adminCallerOK)
	e.AddFunction("methodOK", adminMethodOK)
	e.AddFunction("onOK", adminOnOK)
	return e, nil
}

// ask returns whether a row allows and none denies, and the row that decided.
func (s *adminSet) ask(e *casbin.Enforcer, caller spiffeid.ID, method, on string) (ok bool, rule string, err error) {
	defer func() {
		if p := recover(); p != nil {
			ok, rule, err = false, "", fmt.Errorf("casbin panicked: %v", p)
		}
	}()
	if s.err != nil {
		return false, "", s.err
	}
	who := mesh.AdminLocal
	if !caller.IsZero() {
		who = caller.String()
	}
	ok, row, err := e.EnforceEx(who, method, on)
	if err != nil {
		return false, "", fmt.Errorf("ask casbin: %w", err)
	}
	if len(row) == 0 {
		return false, "", nil
	}
	return ok, row[0], nil
}

// byName are the methods that a row must name to allow them: patterns are in rows
// that are older than what these let one see.
var byName = map[string]bool{"mesh.Tap": true}

// adminCallerOK: no pattern speaks of the local user, nor "local" of another.
func adminCallerOK(args ...any) (any, error) {
	a, ok, err := texts(args, 2)
	if !ok {
		return false, err
	}
	if local := a[0] == mesh.AdminLocal; local || a[1] == mesh.AdminLocal {
		return a[0] == a[1], nil
	}
	return mesh.MatchSrc(a[1], a[0]), nil
}

// adminMethodOK: what is in byName is allowed by no pattern, and denied by one.
func adminMethodOK(args ...any) (any, error) {
	a, ok, err := texts(args, 3)
	if !ok {
		return false, err
	}
	if byName[a[0]] && a[2] == string(mesh.Allow) {
		return a[1] == a[0], nil
	}
	service, _, _ := strings.Cut(a[0], ".")
	return a[1] == "*" || a[1] == a[0] || a[1] == service+".*", nil
}

// adminOnOK: of a call that concerns no identity only "**" speaks.
func adminOnOK(args ...any) (any, error) {
	if len(args) == 2 && args[1] == mesh.Any {
		return true, nil
	}
	a, ok, err := texts(args, 2)
	return ok && mesh.MatchSrc(a[1], a[0]), err
}
