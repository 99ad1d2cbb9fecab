package mesh

import (
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	issuerPath = "/spire/server"
	agentPath  = "/spire/agent/"
)

// IsAlias reports whether the entry is a node alias: its parent is the issuer,
// its selectors are facts of nodes. Nobody is given its identity; what has that
// as its parent is for every agent that has all the selectors.
func (e Entry) IsAlias() bool { return e.ParentID.Path() == issuerPath }

// Lapsed reports whether the entry has ended.
func (e Entry) Lapsed(now time.Time) bool {
	return !e.ExpiresAt.IsZero() && !now.Before(e.ExpiresAt)
}

// A Lineage says which entries are whose: those that have an agent for their
// parent or an alias of it, and those below them. It is immutable.
type Lineage struct {
	// children are the entries by their parent, aliases the node aliases by the
	// least of their selectors.
	children map[spiffeid.ID][]Entry
	aliases  map[Selector][]ranked
	// flat: no entry has a parent that is no agent.
	flat bool
}

type ranked struct {
	Entry
	rank int
}

// NewLineage reads entries, which the caller gives away.
func NewLineage(entries []Entry) *Lineage {
	l := &Lineage{children: map[spiffeid.ID][]Entry{}, aliases: map[Selector][]ranked{}, flat: true}
	for i, e := range entries {
		switch {
		case !e.IsAlias():
			l.children[e.ParentID] = append(l.children[e.ParentID], e)
			l.flat = l.flat && strings.HasPrefix(e.ParentID.Path(), agentPath)
		case len(e.Selectors) > 0: // one without would match every node
			least := slices.MinFunc(e.Selectors, func(a, b Selector) int { return strings.Compare(a.String(), b.String()) })
			l.aliases[least] = append(l.aliases[least], ranked{e, i})
		}
	}
	return l
}

// Of returns the entries of an agent with those selectors as of now. It has
// none twice, and the order is always the same.
func (l *Lineage) Of(agent spiffeid.ID, selectors []Selector, now time.Time) (out []Entry) {
	if l.flat {
		return slices.DeleteFunc(slices.Clone(l.children[agent]), func(e Entry) bool { return e.Lapsed(now) })
	}
	seen := map[spiffeid.ID]bool{}
	add := func(parent spiffeid.ID) {
		below := l.children[parent]
		if len(below) == 0 || seen[parent] {
			return
		}
		seen[parent] = true
		for _, e := range below {
			if !e.Lapsed(now) {
				out = append(out, e)
			}
		}
	}
	add(agent)
	for _, a := range l.aliasesOf(agent, selectors, now) {
		add(a.SPIFFEID)
	}
	for i := 0; i < len(out); i++ {
		add(out[i].SPIFFEID)
	}
	return out
}

// aliasesOf are the aliases all of whose selectors an agent has, in the order
// given.
func (l *Lineage) aliasesOf(agent spiffeid.ID, selectors []Selector, now time.Time) (out []ranked) {
	if len(l.aliases) == 0 {
		return nil
	}
	// As in SPIRE, what an agent is called is a fact of it too.
	has := map[Selector]bool{{Type: nodeID, Value: agent.String()}: true}
	for _, s := range selectors {
		has[s] = true
	}
	for s := range has {
		for _, a := range l.aliases[s] {
			if !a.Lapsed(now) && !slices.ContainsFunc(a.Selectors, func(s Selector) bool { return !has[s] }) {
				out = append(out, a)
			}
		}
	}
	slices.SortFunc(out, func(a, b ranked) int { return a.rank - b.rank })
	return out
}

// Gives reports whether one of an agent's entries is for id.
func (l *Lineage) Gives(agent spiffeid.ID, selectors []Selector, id spiffeid.ID, now time.Time) bool {
	is := func(e Entry) bool { return e.SPIFFEID == id && !e.Lapsed(now) }
	if slices.ContainsFunc(l.children[agent], is) {
		return true
	}
	return !l.flat && slices.ContainsFunc(l.Of(agent, selectors, now), is)
}

// Keeps reports whether nobody can have lost an identity on the way from old to
// l: each pair of parent and identity, and each alias, is still there.
func (l *Lineage) Keeps(old *Lineage) bool {
	have := l.pairs()
	for p := range old.pairs() {
		if !have[p] {
			return false
		}
	}
	return true
}

type pair struct {
	parent, id spiffeid.ID
	// alias is the hash of an alias with its selectors.
	alias string
}

func (l *Lineage) pairs() map[pair]bool {
	out := make(map[pair]bool, len(l.children))
	for parent, below := range l.children {
		for _, e := range below {
			out[pair{parent: parent, id: e.SPIFFEID}] = true
		}
	}
	for _, same := range l.aliases {
		for _, a := range same {
			out[pair{id: a.SPIFFEID, alias: entryID(a.Entry)}] = true
		}
	}
	return out
}
