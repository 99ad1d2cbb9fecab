package review

import (
	"bufio"
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/audit"
	"sallyport/internal/mesh"
)

// An Observed is what an audit log says of calls that are alike.
type Observed struct {
	Dir  mesh.Direction `json:"dir"`
	Src  string         `json:"src"`
	Dst  string         `json:"dst"`
	Port uint16         `json:"port"`
	Verb string         `json:"verb"`
	// Path is a path, or the template of many.
	Path string `json:"path"`
	// Allowed is how they were decided, by Rule if one decided, for Reason.
	Allowed bool   `json:"allowed"`
	Rule    string `json:"rule,omitempty"`
	Reason  string `json:"reason"`
	// Calls counts them. Example is the id of one, First and Last when they
	// were recorded.
	Calls   uint64    `json:"calls"`
	Example string    `json:"example"`
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
}

// String is the calls on one line.
func (o *Observed) String() string {
	return fmt.Sprintf("%s %s -> %s port %d %s %s", o.Dir, o.Src, o.Dst, o.Port, o.Verb, o.Path)
}

// A Traffic is what is known of the calls in audit logs.
type Traffic struct {
	Observed []Observed
	// Vague counts refusals of which the log keeps no destination.
	Vague uint64

	at map[Observed]int
	// counted has the keys of which a roll-up says how many there were.
	counted map[Observed]bool
}

// longestLine bounds a line of an audit log, bytes.
const longestLine = 1 << 20

// Read adds the records of a log, native JSON lines, to the traffic. A line
// that is not a record is an error.
func (t *Traffic) Read(r io.Reader) error {
	if t.at == nil {
		t.at, t.counted = map[Observed]int{}, map[Observed]bool{}
	}
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, longestLine)
	n := 0
	for sc.Scan() {
		n++
		rec, _, err := audit.ParseLine(append(sc.Bytes(), '\n'))
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
		t.add(&rec)
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("line %d: %w", n+1, err)
	}
	return nil
}

// add takes note of a record, if it speaks of calls that were judged.
func (t *Traffic) add(r *audit.Record) {
	rollup := r.Kind == audit.KindRollup && r.Detail == ""
	if r.Kind != audit.KindDecision && !rollup || r.Decision != audit.Allow && r.Decision != audit.Deny {
		return
	}
	switch r.Reason {
	case "bad_request", "internal", "audit", "oracle_mismatch":
		return // no row decided these
	}
	if r.Dst == "" || r.Port == 0 {
		t.Vague += r.Count
		return
	}
	o := Observed{
		Dir: mesh.Direction(r.Dir), Src: r.Src, Dst: r.Dst, Port: r.Port, Verb: r.Verb, Path: r.Path,
		Allowed: r.Decision == audit.Allow, Rule: r.Rule, Reason: r.Reason,
	}
	if o.Path != "-" {
		o.Path = audit.Template(o.Path)
	}
	if rollup && r.Path == "" {
		o.Path = "-"
	}
	i, known := t.at[o]
	if !known {
		i = len(t.Observed)
		t.at[o] = i
		seen := o
		seen.First, seen.Example = r.Time, r.ID
		t.Observed = append(t.Observed, seen)
	}
	x := &t.Observed[i]
	switch {
	case rollup && !t.counted[o]:
		// What stood for itself until now is among what the roll-ups count.
		t.counted[o], x.Calls = true, r.Count
	case rollup:
		x.Calls += r.Count
	case !t.counted[o] || r.Count == 1:
		x.Calls++
	}
	first := r.Time
	if rollup {
		first = r.From
	}
	if first.Before(x.First) {
		x.First = first
	}
	if r.Time.After(x.Last) {
		x.Last = r.Time
	}
}

// A Replayed is what would become of calls that were observed.
type Replayed struct {
	Observed
	// Now is "allow" or "deny", or "depends" when the log does not say enough;
	// On says then on what, and Rule of Is on which row.
	Now string   `json:"now"`
	Is  string   `json:"is,omitempty"`
	On  []string `json:"on,omitempty"`
}

// Depends is a value of Replayed.Now beside those of mesh.Effect.
const Depends = "depends"

// Replay decides what was observed by p and returns what would be decided
// otherwise, or could be. Audit logs keep neither tokens nor server names: a
// condition on these holds for certain only where was, when it is given, has
// it in the row that allowed the call. The environment may be empty.
func Replay(p, was *mesh.Policies, environment string, t *Traffic) ([]Replayed, error) {
	j, err := newReplayer(p, environment)
	if err != nil {
		return nil, err
	}
	held := map[string][]string{}
	if was != nil {
		for i := range was.Rules {
			held[was.Rules[i].ID] = strings.Fields(was.Rules[i].Cond)
		}
	}
	var out []Replayed
	for i := range t.Observed {
		o := &t.Observed[i]
		var known []string
		if o.Allowed && o.Reason == "rule" {
			known = held[o.Rule]
		}
		r := j.decide(o, known)
		if before := map[bool]string{true: "allow", false: "deny"}[o.Allowed]; r.Now != before {
			out = append(out, r)
		}
	}
	slices.SortStableFunc(out, func(a, b Replayed) int {
		return cmp.Or(cmp.Compare(b.Now, a.Now), cmp.Compare(b.Calls, a.Calls), cmp.Compare(a.Src, b.Src), cmp.Compare(a.Dst, b.Dst), cmp.Compare(a.Path, b.Path), cmp.Compare(a.Verb, b.Verb))
	})
	return out, nil
}

// replayer judges calls of which not everything is known.
type replayer struct {
	p       *mesh.Policies
	members members
	conds   [][]mesh.Cond
	env     string
	// modes say what is not enforced.
	modes mesh.Snapshot
}

func newReplayer(p *mesh.Policies, env string) (*replayer, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	j := &replayer{p: p, members: membersOf(p.Memberships), env: env, modes: mesh.Snapshot{Modes: p.Modes, Destinations: p.Destinations}}
	for i := range p.Rules {
		conds, err := mesh.ParseCond(p.Rules[i].Cond)
		if err != nil {
			return nil, fmt.Errorf("row %s: %w", p.Rules[i].ID, err)
		}
		j.conds = append(j.conds, conds)
	}
	return j, nil
}

// fit says how a row fits a call of which not everything is known.
type fit int

const (
	no fit = iota
	maybe
	yes
)

// decide judges what was observed. What it leaves open is in On.
func (j *replayer) decide(o *Observed, known []string) Replayed {
	out := Replayed{Observed: *o, Now: string(mesh.Deny)}
	var allow, deny, mayAllow, mayDeny string
	var onAllow, onDeny []string
	src, err := spiffeid.FromString(o.Src)
	if err != nil {
		return out // nobody
	}
	access := j.modes.ModeTo(o.Dst)
	for i := range j.p.Rules {
		r := &j.p.Rules[i]
		mode := access
		if r.Guard() {
			mode = j.modes.ModeOf(r)
		}
		if r.Effect == mesh.Deny && mode != mesh.Enforce {
			continue
		}
		f, on := j.fits(i, o, src, known)
		switch {
		case f == yes && r.Effect == mesh.Allow:
			allow = cmp.Or(allow, r.ID)
		case f == yes:
			deny = cmp.Or(deny, r.ID)
		case f == maybe && r.Effect == mesh.Allow:
			mayAllow, onAllow = cmp.Or(mayAllow, r.ID), append(onAllow, on...)
		case f == maybe:
			mayDeny, onDeny = cmp.Or(mayDeny, r.ID), append(onDeny, on...)
		}
	}
	if allow == "" && access != mesh.Enforce {
		allow = "modes.yaml"
		if access != j.modes.ModeOf(nil) {
			allow = "egress.yaml"
		}
	}
	switch {
	case deny != "":
		out.Is = deny
	case allow != "" && mayDeny == "":
		out.Now, out.Is = string(mesh.Allow), allow
	case allow != "":
		out.Now, out.Is, out.On = Depends, mayDeny, onDeny
	case mayAllow != "":
		out.Now, out.Is, out.On = Depends, mayAllow, append(onAllow, onDeny...)
	default:
		out.Is = "no_row"
	}
	slices.Sort(out.On)
	out.On = slices.Compact(out.On)
	return out
}

// fits compares row i, and lists what it is not known to want in vain.
func (j *replayer) fits(i int, o *Observed, src spiffeid.ID, known []string) (fit, []string) {
	r := &j.p.Rules[i]
	if r.Dir != o.Dir || !j.members.matchSrc(r, o.Src) || !j.members.matchDst(r, o.Dst) || !mesh.MatchPort(r.Port, o.Port) {
		return no, nil
	}
	var on []string
	switch {
	case o.Verb == "*" && r.Verb != "*": // any verb that rows cannot name
		return no, nil
	case o.Verb != "*" && !mesh.MatchVerb(r.Verb, o.Verb):
		return no, nil
	}
	switch fitPath(r.Path, o.Path) {
	case no:
		return no, nil
	case maybe:
		on = append(on, "path "+r.Path)
	}
	for k := range j.conds[i] {
		c := &j.conds[i][k]
		_, text := condTerm(c)
		switch {
		case c.Word == mesh.CondUnlessSrc:
			if mesh.MatchSrc(c.Value, src.String()) {
				return no, nil
			}
		case c.Word == mesh.CondWhen || c.Word == mesh.CondUntil:
			first, last := c.Within(o.First), c.Within(o.Last)
			if !first && !last && o.Last.Sub(o.First) < time.Minute {
				return no, nil
			}
			if !first || !last || c.Word == mesh.CondWhen && o.Last.Sub(o.First) >= time.Minute {
				on = append(on, text)
			}
		case c.Word == mesh.CondEnv && j.env != "":
			if c.Value != j.env {
				return no, nil
			}
		case !slices.Contains(known, text):
			on = append(on, text)
		}
	}
	if len(on) > 0 {
		return maybe, on
	}
	return yes, nil
}

// fitPath compares the path of a row with a path or the template of many.
func fitPath(pattern, path string) fit {
	if !unclear(path) {
		if mesh.MatchPath(pattern, path) {
			return yes
		}
		return no
	}
	switch pattern {
	case mesh.Any:
		return yes
	case "-":
		return no
	}
	ps, ss := strings.Split(pattern, "/"), strings.Split(path, "/")
	out := yes
	for i, p := range ps {
		switch {
		case p == mesh.Any:
			return out
		case i < len(ss) && (ss[i] == mesh.Any || strings.Contains(ss[i], "…")):
			return maybe
		case i >= len(ss):
			return no
		case ss[i] == "{}" || strings.Contains(ss[i], "[redacted]"):
			if p != "*" {
				out = maybe
			}
		case p != ss[i] && (p != "*" || ss[i] == ""):
			return no
		}
	}
	switch {
	case len(ss) == len(ps):
		return out
	case len(ss) == len(ps)+1 && ss[len(ps)] == mesh.Any:
		return maybe
	}
	return no
}

// unclear reports whether a recorded path stands for more than itself. No path
// that is judged has these characters.
func unclear(path string) bool {
	return strings.ContainsAny(path, "{[…") || path == mesh.Any || strings.HasSuffix(path, "/**")
}
