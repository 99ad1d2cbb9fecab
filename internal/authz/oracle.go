package authz

import (
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/casbin/casbin/v2"
	"github.com/casbin/casbin/v2/model"
	"github.com/casbin/casbin/v2/persist"

	"sallyport/internal/mesh"
)

//go:embed model.conf
var modelText string

// What Casbin must have understood of the model, byte for byte. Its parser cuts
// long lines and everything after "#" or ";" without a word.
const (
	wantRequest = "dir, src, dst, port, verb, path, tok, env"
	wantPolicy  = "id, dir, src, dst, port, verb, path, cond, eft"
	wantEffect  = "some(where (p_eft == allow)) && !some(where (p_eft == deny))"
	wantMatcher = "idOK(r_dir, r_src, r_dst) && r_dir == p_dir && srcOK(r_src, p_src) && dstOK(r_dir, r_dst, p_dst)" +
		" && portOK(r_port, p_port) && verbOK(r_verb, p_verb) && pathOK(r_path, p_path) && condOK(r_tok, r_env, p_cond)"
)

var modelWant = map[string]string{"r": wantRequest, "p": wantPolicy, "e": wantEffect, "m": wantMatcher}

// oracle is Casbin with our model and rows. It is the meaning of the policy.
type oracle struct {
	enforcer *casbin.Enforcer
	// members has for each group who is in it.
	members map[string]map[string]bool
	conds   map[string][]mesh.Cond
}

func newOracle(rows []mesh.Rule, groups map[string][]string) (*oracle, error) {
	m, err := parseModel(modelText, modelWant)
	if err != nil {
		return nil, err
	}
	o := &oracle{members: make(map[string]map[string]bool, len(groups)), conds: map[string][]mesh.Cond{}}
	for g, names := range groups {
		o.members[g] = make(map[string]bool, len(names))
		for _, n := range names {
			o.members[g][n] = true
		}
	}
	for i := range rows {
		r := &rows[i]
		if err := loadRow(m, rowFields(r)); err != nil {
			return nil, fmt.Errorf("load row %s: %w", r.ID, err)
		}
		if o.conds[r.Cond], err = mesh.ParseCond(r.Cond); err != nil {
			return nil, fmt.Errorf("load row %s: %w", r.ID, err)
		}
	}
	if n := len(m["p"]["p"].Policy); n != len(rows) {
		return nil, fmt.Errorf("casbin kept %d of %d rows", n, len(rows))
	}
	if o.enforcer, err = casbin.NewEnforcer(m); err != nil {
		return nil, fmt.Errorf("start casbin: %w", err)
	}
	for name, f := range map[string]func(...any) (any, error){
		"idOK": o.idOK, "srcOK": o.srcOK, "dstOK": o.dstOK, "portOK": o.portOK,
		"verbOK": o.verbOK, "pathOK": o.pathOK, "condOK": o.condOK,
	} {
		o.enforcer.AddFunction(name, f)
	}
	return o, nil
}

// parseModel parses a model and refuses one that is not what is wanted, by
// section.
func parseModel(text string, want map[string]string) (model.Model, error) {
	want = maps.Clone(want)
	m, err := model.NewModelFromString(text)
	if err != nil {
		return nil, fmt.Errorf("parse model: %w", err)
	}
	for sec, defs := range m {
		if sec == "logger" {
			continue // Casbin keeps its logger among the definitions
		}
		for key, def := range defs {
			if w, ok := want[sec]; !ok || key != sec || def.Value != w {
				return nil, fmt.Errorf("model: casbin understood %s.%s as %q, which is not what this program was built with", sec, key, def.Value)
			}
		}
		if len(defs) > 0 {
			delete(want, sec)
		}
	}
	if len(want) > 0 {
		return nil, fmt.Errorf("model: casbin understood only %d of 4 definitions", 4-len(want))
	}
	return m, nil
}

// loadRow adds one row; Casbin panics on some that it does not like.
func loadRow(m model.Model, fields []string) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("casbin panicked: %v", p)
		}
	}()
	before := len(m["p"]["p"].Policy)
	if err := persist.LoadPolicyArray(append([]string{"p"}, fields...), m); err != nil {
		return err
	}
	kept := m["p"]["p"].Policy
	if len(kept) != before+1 || !slices.Equal(kept[len(kept)-1], fields) {
		return errors.New("casbin dropped the row as a double of another one")
	}
	return nil
}

// Oracle answers by asking Casbin. It takes 10 us, and 1 us more for each row.
// The reason of a default denial is NoRow. An error is a denial.
func (s *Set) Oracle(c *Call) (d Decision, err error) {
	defer func() {
		if p := recover(); p != nil {
			d, err = Decision{Reason: Internal}, fmt.Errorf("casbin panicked: %v", p)
		}
	}()
	if s.Len() == 0 {
		return Decision{Reason: NoPolicy}, nil
	}
	if !c.speakable() {
		return Decision{Reason: BadRequest}, nil
	}
	ok, row, err := s.oracle.enforce(c)
	if err != nil {
		return Decision{Reason: Internal}, fmt.Errorf("ask casbin: %w", err)
	}
	if len(row) == 0 {
		return Decision{Reason: NoRow}, nil
	}
	return Decision{Allow: ok, Rule: row[0], Reason: ByRule}, nil
}

func (o *oracle) enforce(c *Call) (bool, []string, error) {
	return o.enforcer.EnforceEx(string(c.Dir), c.Src.String(), c.Dst, strconv.Itoa(int(c.Port)), c.Verb, c.Path, c.Token, c)
}

// texts gives the arguments of a matching function. An empty one matches
// nothing: Casbin judges an empty policy by asking once with empty fields.
func texts(args []any, n int) ([]string, bool, error) {
	if len(args) != n {
		return nil, false, fmt.Errorf("%d arguments, want %d", len(args), n)
	}
	out := make([]string, n)
	for i, a := range args {
		s, ok := a.(string)
		if !ok {
			return nil, false, fmt.Errorf("argument %d is a %T, want a string", i+1, a)
		}
		if s == "" {
			return nil, false, nil
		}
		out[i] = s
	}
	return out, true, nil
}

func (o *oracle) idOK(args ...any) (any, error) {
	a, ok, err := texts(args, 3)
	if !ok {
		return false, err
	}
	want := map[string]string{string(mesh.In): "spiffe://", string(mesh.Out): "host:"}[a[0]]
	return want != "" && strings.HasPrefix(a[1], "spiffe://") && strings.HasPrefix(a[2], want), nil
}

func (o *oracle) srcOK(args ...any) (any, error) {
	a, ok, err := texts(args, 2)
	if !ok {
		return false, err
	}
	return mesh.MatchSrc(a[1], a[0]) || o.members[a[1]][a[0]], nil
}

func (o *oracle) dstOK(args ...any) (any, error) {
	a, ok, err := texts(args, 3)
	if !ok {
		return false, err
	}
	dir, dst, pattern := mesh.Direction(a[0]), a[1], a[2]
	return mesh.MatchDst(dir, pattern, dst) || o.members[pattern][dst], nil
}

func (o *oracle) portOK(args ...any) (any, error) {
	a, ok, err := texts(args, 2)
	if !ok {
		return false, err
	}
	n, err := strconv.ParseUint(a[0], 10, 16)
	return err == nil && mesh.MatchPort(a[1], uint16(n)), err
}

func (o *oracle) verbOK(args ...any) (any, error) {
	a, ok, err := texts(args, 2)
	if !ok {
		return false, err
	}
	return mesh.MatchVerb(a[1], a[0]), nil
}

func (o *oracle) pathOK(args ...any) (any, error) {
	a, ok, err := texts(args, 2)
	if !ok {
		return false, err
	}
	return mesh.MatchPath(a[1], a[0]), nil
}

func (o *oracle) condOK(args ...any) (any, error) {
	if len(args) != 3 {
		return false, fmt.Errorf("%d arguments, want 3", len(args))
	}
	tok, ok1 := args[0].(*Token)
	call, ok2 := args[1].(*Call)
	text, ok3 := args[2].(string)
	if !ok1 || !ok2 || !ok3 {
		return false, fmt.Errorf("arguments are %T, %T, %T", args[0], args[1], args[2])
	}
	if text == "" || call == nil || call.Token != tok {
		return false, nil
	}
	conds, ok := o.conds[text]
	if !ok {
		return false, fmt.Errorf("condition %q was not loaded", text)
	}
	return failedCond(conds, call) == nil, nil
}
