package authz

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

// A Set is a policy ready to judge by: immutable, safe for concurrent use. The
// nil Set denies everything.
type Set struct {
	revision uint64
	rows     []mesh.Rule
	conds    [][]mesh.Cond // of each row
	groups   map[string][]string
	in, out  *table
	oracle   *oracle
	keep     map[string]mesh.Keeping // by destination; those that are not usual
	lenient  *lenient                // nil when every file is enforced
}

// keeping says how calls to dst are recorded: usually counted, and refused
// when they cannot be.
func (s *Set) keeping(dst string) mesh.Keeping {
	if s == nil || len(s.keep) == 0 {
		return mesh.Keeping{}
	}
	return s.keep[dst]
}

// Compile loads the rows of a snapshot into Casbin and compiles the index. A
// row that Casbin would misunderstand, a model that does not say what it should
// and a row that got lost are errors. A snapshot without rows gives a Set that
// denies everything.
func Compile(snap *mesh.Snapshot) (*Set, error) {
	if snap == nil {
		return nil, errors.New("compile policy: no snapshot")
	}
	s, err := compileIndex(snap)
	if err == nil {
		s.lenient, err = compileModes(snap)
	}
	if err == nil {
		s.oracle, err = newOracle(s.rows, s.groups)
	}
	if err != nil {
		return nil, fmt.Errorf("compile policy: %w", err)
	}
	return s, nil
}

// compileIndex is Compile without Casbin and as if every file were enforced.
func compileIndex(snap *mesh.Snapshot) (*Set, error) {
	if err := checkRows(snap); err != nil {
		return nil, err
	}
	s := &Set{
		revision: snap.PolicyRevision,
		rows:     slices.Clone(snap.Rules),
		groups:   expandGroups(snap.Memberships),
		in:       newTable(),
		out:      newTable(),
	}
	for _, svc := range snap.Services {
		if k := svc.Keeping(); k != (mesh.Keeping{}) {
			if s.keep == nil {
				s.keep = map[string]mesh.Keeping{}
			}
			s.keep[svc.ID.String()] = k
		}
	}
	for i := range s.rows {
		if err := s.add(i); err != nil {
			return nil, fmt.Errorf("row %s: %w", s.rows[i].ID, err)
		}
	}
	s.in.seal()
	s.out.seal()
	return s, nil
}

// add puts row i into the index.
func (s *Set) add(i int) error {
	r := &s.rows[i]
	conds, err := mesh.ParseCond(r.Cond)
	if err != nil {
		return err
	}
	s.conds = append(s.conds, conds)
	c := rule{id: r.ID, row: int32(i), deny: r.Effect == mesh.Deny, conds: conds}
	if r.Port != "*" {
		n, err := strconv.ParseUint(r.Port, 10, 16)
		if err != nil || n == 0 {
			return fmt.Errorf("port %q is not a number from 1 to 65535", r.Port)
		}
		c.port = uint16(n)
	}
	c.setVerbs(r.Verb)
	c.setPath(r.Path)
	s.table(r.Dir).add(r, c, s.groups)
	return nil
}

func (s *Set) table(dir mesh.Direction) *table {
	if dir == mesh.In {
		return s.in
	}
	return s.out
}

// Revision is the policy revision of the snapshot.
func (s *Set) Revision() uint64 {
	if s == nil {
		return 0
	}
	return s.revision
}

// Len is the number of rows.
func (s *Set) Len() int {
	if s == nil {
		return 0
	}
	return len(s.rows)
}

// found is what matched so far. Of several rows the first one counts.
type found struct {
	deny, allow, near *rule
	reason            Reason // of near, which only a condition kept out
}

// look compares the rules with the call. Rules that could not change the
// decision any more are passed over.
func (f *found) look(rules []rule, c *Call, bit uint32) {
	for i := range rules {
		r := &rules[i]
		switch {
		case r.port != 0 && r.port != c.Port:
			continue
		case f.deny != nil && (!r.deny || f.deny.row < r.row):
			continue
		case !r.deny && f.allow != nil && f.allow.row < r.row:
			continue
		case !r.matches(bit, c.Verb, c.Path):
			continue
		}
		if len(r.conds) > 0 {
			if w := failedCond(r.conds, c); w != nil {
				f.missed(r, w)
				continue
			}
		}
		if r.deny {
			f.deny = r
		} else {
			f.allow = r
		}
	}
}

func (f *found) missed(r *rule, w *mesh.Cond) {
	if !r.deny && (f.near == nil || r.row < f.near.row) {
		f.near, f.reason = r, reasonFor(w)
	}
}

func (f *found) decision() Decision {
	switch {
	case f.deny != nil:
		return Decision{Rule: f.deny.id, Reason: ByRule}
	case f.allow != nil:
		return Decision{Allow: true, Rule: f.allow.id, Reason: ByRule}
	case f.near != nil:
		return Decision{Reason: f.reason}
	}
	return Decision{Reason: NoRow}
}

// scratch is how many classes of a name that no row writes out fit on the
// stack. More cost an allocation, not correctness.
const scratch = 16

// Decide answers from the index, by the rows of all files as if each were
// enforced. It does not allocate.
func (s *Set) Decide(c *Call) Decision {
	if s == nil || len(s.rows) == 0 {
		return Decision{Reason: NoPolicy}
	}
	if !c.speakable() {
		return Decision{Reason: BadRequest}
	}
	var (
		f        found
		srcs     [scratch]class
		dsts     [scratch]class
		t        = s.table(c.Dir)
		bit      = verbBit(c.Verb)
		dstFound = t.dst.of(c.Dst, dsts[:0])
	)
	if len(dstFound) == 0 {
		return Decision{Reason: NoRow}
	}
	for _, src := range t.src.of(c.Src.String(), srcs[:0]) {
		for _, dst := range dstFound {
			if rules := t.rules[pair(src, dst)]; rules != nil {
				f.look(rules, c, bit)
			}
		}
	}
	return f.decision()
}

// A Slice holds the rules for one source, destination and port: what a
// connection needs. It is immutable and belongs to one Set.
type Slice struct {
	set   *Set
	dir   mesh.Direction
	src   spiffeid.ID
	dst   string
	port  uint16
	rules []rule // denies first, then in the order of rows
}

// Slice collects the rules that calls between the two can meet.
func (s *Set) Slice(dir mesh.Direction, src spiffeid.ID, dst string, port uint16) *Slice {
	sl := &Slice{set: s, dir: dir, src: src, dst: dst, port: port}
	probe := Call{Dir: dir, Src: src, Dst: dst, Port: port, Verb: "CONNECT", Path: "-"}
	if s.Len() == 0 || !probe.speakable() {
		return sl
	}
	t := s.table(dir)
	seen := map[int32]bool{} // a name can be in a class twice
	for _, a := range t.src.of(src.String(), nil) {
		for _, b := range t.dst.of(dst, nil) {
			for _, r := range t.rules[pair(a, b)] {
				if (r.port == 0 || r.port == port) && !seen[r.row] {
					seen[r.row] = true
					sl.rules = append(sl.rules, r)
				}
			}
		}
	}
	slices.SortFunc(sl.rules, func(a, b rule) int {
		if a.deny != b.deny {
			if a.deny {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.row, b.row)
	})
	return sl
}

// Decide answers as Set.Decide would. It does not allocate. A call between
// others than the slice was made for is refused.
func (sl *Slice) Decide(c *Call) Decision {
	if sl == nil || sl.set.Len() == 0 {
		return Decision{Reason: NoPolicy}
	}
	if c.Dir != sl.dir || c.Port != sl.port || c.Src != sl.src || c.Dst != sl.dst || !c.speakable() {
		return Decision{Reason: BadRequest}
	}
	reason := NoRow
	bit := verbBit(c.Verb)
	for i := range sl.rules {
		r := &sl.rules[i]
		if !r.matches(bit, c.Verb, c.Path) {
			continue
		}
		if len(r.conds) > 0 {
			if w := failedCond(r.conds, c); w != nil {
				if reason == NoRow && !r.deny {
					reason = reasonFor(w)
				}
				continue
			}
		}
		return Decision{Allow: !r.deny, Rule: r.id, Reason: ByRule}
	}
	return Decision{Reason: reason}
}

// reaches reports whether a row allows a call between the two and none denies
// them all, or the rows that would are not enforced.
func (s *Set) reaches(dir mesh.Direction, src spiffeid.ID, dst string, port uint16) bool {
	switch {
	case s.Len() == 0:
		return false
	case s.modeTo(dir, dst) != mesh.Enforce:
		return true
	}
	for _, r := range s.Slice(dir, src, dst, port).rules { // denials first
		switch {
		case !r.deny:
			return true
		case r.verbs == anyVerb && r.kind == anyPath && len(r.conds) == 0 && !s.lenientOn(&r):
			return false
		}
	}
	return false
}

// lenientOn says that the file of a row is not enforced.
func (s *Set) lenientOn(r *rule) bool {
	return s.lenient != nil && s.lenient.guards[r.id] && s.lenient.guard != mesh.Enforce
}
