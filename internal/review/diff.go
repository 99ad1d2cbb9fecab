package review

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// ErrTooWide is returned for policies whose conditions combine in so many ways
// that comparing them would not end in reasonable time. Nothing is estimated.
var ErrTooWide = errors.New("the rows combine in too many ways to compare: compare fewer conditions on one destination")

// widest is how many sets of rows a comparison looks at, about ten seconds.
const widest = 2_000_000

// A Cell is a set of calls whose decision a change of policy turns round.
type Cell struct {
	// Effect is the new decision of every call in the cell.
	Effect mesh.Effect `json:"effect"`
	// Each of these says what calls of the cell have there, in the words of a
	// row, "any" for no limit. When has what must hold of token, environment
	// and time.
	Dir  string `json:"dir"`
	Src  string `json:"src"`
	Dst  string `json:"dst"`
	Port string `json:"port"`
	Path string `json:"path"`
	Verb string `json:"verb"`
	When string `json:"when,omitempty"`
	// Witness is one call of the cell; Was and Is are the rows that decide it.
	Witness Witness `json:"witness"`
	Was     string  `json:"was"`
	Is      string  `json:"is"`
	// Way is how the witness goes out, of calls to hosts outside that become allowed.
	Way *Way `json:"way,omitempty"`

	block block
}

// A Witness is one call, written out.
type Witness struct {
	Dir   string   `json:"dir"`
	Src   string   `json:"src"`
	Dst   string   `json:"dst"`
	Port  uint16   `json:"port"`
	Verb  string   `json:"verb"`
	Path  string   `json:"path"`
	SNI   string   `json:"sni,omitempty"`
	Token []string `json:"token,omitempty"`
	Env   string   `json:"env,omitempty"`
	At    string   `json:"at,omitempty"`

	call authz.Call
}

// Diff returns exactly the calls that new decides otherwise than old, from now
// on. Every dimension is split where a row of either set splits it, so that the
// cells have every call that changed and no other.
func Diff(old, new *mesh.Policies, now time.Time) ([]Cell, error) {
	was, err := judgeOf(old)
	if err != nil {
		return nil, fmt.Errorf("old policies: %w", err)
	}
	snap, err := mesh.Compile(new, 0, 0, nil)
	if err != nil {
		return nil, fmt.Errorf("new policies: %w", err)
	}
	is, err := authz.Compile(snap)
	if err != nil {
		return nil, fmt.Errorf("new policies: %w", err)
	}
	s := &splitter{now: now, left: widest}
	blocks, err := s.changed(boxes(old), boxes(new), map[dimension]bool{})
	if err != nil {
		return nil, err
	}
	var cells []Cell
	for _, b := range blocks {
		c, ok := cellOf(b, now)
		if !ok {
			continue // no client can make such a call
		}
		before, after := was.Decide(&c.Witness.call), is.Decide(&c.Witness.call)
		if after.Allow != b.allowed || before.Allow == after.Allow {
			return nil, fmt.Errorf("the judge does not agree that %s changes, which is a defect of Sallyport: please report it", c.Witness)
		}
		c.Was, c.Is = deciding(before), deciding(after)
		if b.allowed {
			c.Way = wayOf(snap, &c.Witness.call)
		}
		cells = append(cells, c)
	}
	slices.SortStableFunc(cells, func(a, b Cell) int {
		return cmp.Or(cmp.Compare(a.Effect, b.Effect), cmp.Compare(a.Dir, b.Dir), cmp.Compare(a.Src, b.Src), cmp.Compare(a.Dst, b.Dst), cmp.Compare(a.Path, b.Path))
	})
	return cells, nil
}

func judgeOf(p *mesh.Policies) (*authz.Set, error) {
	snap, err := mesh.Compile(p, 0, 0, nil)
	if err != nil {
		return nil, err
	}
	return authz.Compile(snap)
}

// deciding names the row that decided, or why none did.
func deciding(d authz.Decision) string {
	return cmp.Or(d.Rule, string(d.Reason))
}

// cellOf writes a block for people and finds a call in it. It reports false for
// a block of calls that do not exist, such as a GET without a path.
func cellOf(b block, now time.Time) (Cell, bool) {
	c := Cell{Effect: mesh.Deny, Dir: "any", Src: "any", Dst: "any", Port: "any", Path: "any", Verb: "any", block: b}
	if b.allowed {
		c.Effect = mesh.Allow
	}
	var when []string
	pick := map[dimension][]string{}
	for i := range b.sides {
		s := &b.sides[i]
		pick[s.dim] = s.values
		if s.any() {
			continue
		}
		switch text := s.text(); s.dim {
		case byDir:
			c.Dir = text
		case bySrc:
			c.Src = text
		case byDst:
			c.Dst = text
		case byPort:
			c.Port = text
		case byPath:
			c.Path = text
		case byVerb:
			c.Verb = text
		case byToken:
			if s.covers("") {
				when = append(when, "no token")
			}
		default:
			when = append(when, text)
		}
	}
	c.When = strings.Join(when, "; ")
	verb, path, ok := exchange(pick[byVerb], pick[byPath])
	if !ok {
		return c, false
	}
	c.Witness = witness(pick, verb, path, now)
	return c, true
}

// exchange picks a verb and a path that occur together: CONNECT has no path,
// and all others have one.
func exchange(verbs, paths []string) (verb, path string, ok bool) {
	for _, v := range verbs {
		for _, p := range paths {
			if (v == "CONNECT") == (p == "-") {
				return v, p, true
			}
		}
	}
	return "", "", false
}

func witness(pick map[dimension][]string, verb, path string, now time.Time) Witness {
	first := func(d dimension) string {
		if len(pick[d]) == 0 {
			return ""
		}
		return pick[d][0]
	}
	port, _ := strconv.ParseUint(first(byPort), 10, 16)
	w := Witness{
		Dir: first(byDir), Src: first(bySrc), Dst: first(byDst), Port: uint16(port), Verb: verb, Path: path,
		Env: strings.TrimPrefix(first(byEnv), string(mesh.CondEnv)),
	}
	if first(bySNI) != "" {
		w.SNI = strings.TrimPrefix(w.Dst, "host:")
	}
	src, _ := spiffeid.FromString(w.Src)
	w.call = authz.Call{
		Dir: mesh.Direction(w.Dir), Src: src, Dst: w.Dst, Port: w.Port, Verb: verb, Path: path,
		SNI: w.SNI, Environment: w.Env, Now: now,
	}
	if at := first(byTime); at != "" {
		w.At = at
		w.call.Now, _ = time.Parse(time.RFC3339, at)
	}
	if first(byToken) != "" {
		w.call.Token, w.Token = tokenOf(pick)
	}
	return w
}

// tokenOf makes the token that the picked values describe.
func tokenOf(pick map[dimension][]string) (*authz.Token, []string) {
	t := newToken()
	var text []string
	dims := make([]dimension, 0, len(pick))
	for d := range pick {
		dims = append(dims, d)
	}
	slices.Sort(dims)
	for _, d := range dims {
		if rank(d) < 1 || d == byEnv || d == bySNI || d == byTime || pick[d][0] == "" {
			continue
		}
		term := pick[d][0]
		text = append(text, term)
		cs, err := mesh.ParseCond(term)
		if err != nil || len(cs) != 1 {
			continue
		}
		say(t, &cs[0])
	}
	if len(text) == 0 {
		text = []string{noneOfThem}
	}
	return t, text
}

// noneOfThem is a token for which no condition of any row holds.
const noneOfThem = "a token of none of the kinds that rows name"

func newToken() *authz.Token {
	return &authz.Token{Scopes: map[string]bool{}, Claims: map[string]string{}}
}

// say makes the token one for which the condition holds.
func say(t *authz.Token, c *mesh.Cond) {
	switch c.Word {
	case mesh.CondIssuer:
		t.Issuer = c.Value
	case mesh.CondAudience:
		t.Audience = append(t.Audience, c.Value)
	case mesh.CondScope:
		t.Scopes[c.Value] = true
	case mesh.CondClaim:
		t.Claims[c.Key] = c.Value
	case mesh.CondACR:
		t.ACR = c.Level
	case mesh.CondBound:
		t.Bound = true
	}
}

// Covers reports whether a call is in the cell.
func (c *Cell) Covers(call *authz.Call) bool {
	f := factsOf(call)
	for i := range c.block.sides {
		s := &c.block.sides[i]
		if !s.covers(valueOf(s.dim, f)) {
			return false
		}
	}
	return true
}

// callFacts is a call as the dimensions see it.
type callFacts struct {
	*authz.Call
	port string
}

func factsOf(c *authz.Call) *callFacts {
	return &callFacts{Call: c, port: strconv.Itoa(int(c.Port))}
}

// tokenFact writes what the token says of a dimension, as a row would.
func (c *callFacts) tokenFact(d dimension) string {
	t := c.Token
	if t == nil {
		return ""
	}
	switch {
	case d == byToken:
		return hasToken
	case d == byIssuer:
		return string(mesh.CondIssuer) + t.Issuer
	case d == byACR:
		return string(mesh.CondACR) + strconv.Itoa(t.ACR)
	case d == byBound && t.Bound:
		return string(mesh.CondBound)
	}
	if k, ok := strings.CutPrefix(string(d), string(byClaim)); ok {
		return string(byClaim) + k + "=" + t.Claims[k]
	}
	if a, ok := strings.CutPrefix(string(d), string(byAud)); ok && slices.Contains(t.Audience, a) {
		return string(d)
	}
	if s, ok := strings.CutPrefix(string(d), string(byScope)); ok && t.Scopes[s] {
		return string(d)
	}
	return ""
}
