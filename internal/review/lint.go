package review

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"sallyport/internal/mesh"
)

// Lint returns what is valid and probably not meant, in the order of files and
// lines. Policies that are not valid have no findings: Validate comes first.
// Rows that end are compared with now.
func Lint(p *mesh.Policies, now time.Time) []Finding {
	if p.Validate() != nil {
		return nil
	}
	l := linter{p: p, members: membersOf(p.Memberships), exact: map[pair][]int{}}
	for i := range p.Rules {
		if k, ok := exactPair(&p.Rules[i]); ok {
			l.exact[k] = append(l.exact[k], i)
		} else {
			l.open = append(l.open, i)
		}
	}
	for i := range p.Rules {
		l.row(i, now)
	}
	l.groups()
	l.destinations()
	l.services()
	l.tests()
	for _, m := range p.Modes {
		l.add(NotEnforced, m.Origin, m.File, "%s is in mode %s: what it denies is recorded and passes", m.File, m.Mode)
	}
	for _, d := range p.Destinations {
		if d.Mode == mesh.Observe || d.Mode == mesh.Warn {
			l.add(NotEnforced, d.Origin, d.Host, "%s is in mode %s: what access.csv denies there is recorded and passes", d.Host, d.Mode)
		}
	}
	slices.SortStableFunc(l.found, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Origin.File, b.Origin.File), cmp.Compare(a.Origin.Line, b.Origin.Line))
	})
	return l.found
}

type linter struct {
	p       *mesh.Policies
	members members
	// exact has the rows between one identity and one destination, open the
	// others: comparing each row with each would take 40 s for 10,000.
	exact map[pair][]int
	open  []int
	found []Finding
}

type pair struct{ src, dst string }

// exactPair returns who and where, when a row writes both out.
func exactPair(r *mesh.Rule) (pair, bool) {
	vague := mesh.IsGroup(r.Src) || mesh.IsGroup(r.Dst) || strings.Contains(r.Src+r.Dst, "*")
	return pair{r.Src, r.Dst}, !vague
}

// rivals are the rows that could cover row i.
func (l *linter) rivals(i int) []int {
	k, ok := exactPair(&l.p.Rules[i])
	if ok {
		return slices.Concat(l.exact[k], l.open)
	}
	all := make([]int, len(l.p.Rules)) // a group may have one member
	for j := range all {
		all[j] = j
	}
	return all
}

func (l *linter) add(check Check, o mesh.Origin, subject, format string, args ...any) {
	l.found = append(l.found, Finding{Check: check, Origin: o, Subject: subject, Msg: fmt.Sprintf(format, args...)})
}

func (l *linter) row(i int, now time.Time) {
	r := &l.p.Rules[i]
	l.covered(i)
	l.reach(r)
	conds, _ := mesh.ParseCond(r.Cond) // the row is valid
	for _, c := range conds {
		if c.Word == mesh.CondUntil && !c.Within(now) {
			l.add(Expired, r.Origin, r.ID, "row %s ended at %s", r.ID, c.Value)
		}
	}
	if r.Effect != mesh.Allow {
		l.leaky(r, conds)
		return
	}
	l.token(r, conds)
	switch {
	case r.Src == mesh.Any:
		l.add(Broad, r.Origin, r.ID, "row %s allows every identity, of other trust domains too: name the callers", r.ID)
	case r.Dir == mesh.In && (r.Dst == mesh.Any || r.Dst == "*"):
		l.add(Broad, r.Origin, r.ID, "row %s allows calls to every workload: name the destinations", r.ID)
	case r.Dir == mesh.In && r.Verb == "*" && r.Path == mesh.Any:
		l.add(Broad, r.Origin, r.ID, "row %s allows every verb on every path: name what is needed", r.ID)
	}
}

// token finds allow rows that no token can fulfil, and those that take one of
// any issuer.
func (l *linter) token(r *mesh.Rule, conds []mesh.Cond) {
	needs, issuer := false, ""
	for i := range conds {
		needs = needs || conds[i].NeedsToken()
		if conds[i].Word == mesh.CondIssuer {
			issuer = conds[i].Value
		}
	}
	t := l.p.Tokens
	switch {
	case !needs:
	case t.Empty():
		l.add(Unreachable, r.Origin, r.ID, "row %s asks for a token, and tokens.yaml names no issuer", r.ID)
	case issuer == mesh.APIKeyIssuer && len(t.APIKeys) == 0:
		l.add(Unreachable, r.Origin, r.ID, "row %s asks for an API key, and tokens.yaml has none", r.ID)
	case issuer == "":
		l.add(Broad, r.Origin, r.ID, "row %s takes a token of any issuer in tokens.yaml: say iss=", r.ID)
	case issuer != mesh.APIKeyIssuer && !slices.ContainsFunc(t.Issuers, func(i mesh.TokenIssuer) bool { return i.Name() == issuer }):
		l.add(Unreachable, r.Origin, r.ID, "row %s asks for a token of %s, which tokens.yaml does not name", r.ID, issuer)
	}
}

// leaky finds deny rows that a caller can step out of, and those of a pattern
// beside which a row allows the name itself or what is deeper below it.
func (l *linter) leaky(r *mesh.Rule, conds []mesh.Cond) {
	for i := range conds {
		switch c := &conds[i]; {
		case c.NeedsToken():
			l.add(Leaky, r.Origin, r.ID, "row %s does not deny a caller that shows no token, by condition %s%s: allow those with the right token instead", r.ID, c.Word, c.Value)
			return
		case c.Word == mesh.CondSNI:
			l.add(Leaky, r.Origin, r.ID, "row %s does not deny a caller that names no server: leave condition %s%s out", r.ID, c.Word, c.Value)
			return
		}
	}
	apex, wild := strings.CutPrefix(r.Dst, "host:*.")
	if !wild {
		return
	}
	for i := range l.p.Rules {
		o := &l.p.Rules[i]
		if o.Effect != mesh.Allow || o.Dir != mesh.Out {
			continue
		}
		for _, dst := range l.members.patterns(o.Dst) {
			host := strings.TrimPrefix(dst, "host:")
			below := strings.HasSuffix(host, "."+apex) && strings.Count(host, ".") > strings.Count(apex, ".")+1
			if host == apex || below {
				l.add(Leaky, r.Origin, r.ID, "row %s does not deny %s, which %s at %s allows: *. stands for exactly one label", r.ID, host, o.ID, o.Origin)
				return
			}
		}
	}
}

// covered finds another row that takes away the meaning of row i.
func (l *linter) covered(i int) {
	r := &l.p.Rules[i]
	for _, j := range l.rivals(i) {
		o := &l.p.Rules[j]
		if i == j || !l.members.covers(o, r) {
			continue
		}
		switch {
		case o.Effect == mesh.Deny && r.Effect == mesh.Allow:
			l.add(Shadowed, r.Origin, r.ID, "row %s never allows anything: %s at %s denies all of it", r.ID, o.ID, o.Origin)
			return
		case o.Effect == r.Effect && (i > j || !l.members.covers(r, o)):
			l.add(Redundant, r.Origin, r.ID, "row %s changes nothing: %s at %s covers it", r.ID, o.ID, o.Origin)
			return
		}
	}
}

// reach finds allow rows whose caller, destination or port does not exist.
func (l *linter) reach(r *mesh.Rule) {
	if r.Effect != mesh.Allow {
		return
	}
	own := "spiffe://" + l.p.TrustDomain.Name() + "/"
	for _, src := range l.members.patterns(r.Src) {
		issued := slices.ContainsFunc(l.p.Entries, func(e mesh.Entry) bool { return mesh.MatchSrc(src, e.SPIFFEID.String()) })
		if strings.HasPrefix(src, own) && !issued {
			l.add(Unreachable, r.Origin, r.ID, "row %s: no entry gives anyone the identity %s", r.ID, src)
		}
	}
	for _, dst := range l.members.patterns(r.Dst) {
		if r.Dir == mesh.Out {
			l.host(r, strings.TrimPrefix(dst, "host:"))
			continue
		}
		served, port := false, false
		for _, s := range l.p.Services {
			if mesh.MatchDst(mesh.In, dst, s.ID.String()) {
				served, port = true, port || mesh.MatchPort(r.Port, s.Port)
			}
		}
		switch {
		case !served:
			l.add(Unreachable, r.Origin, r.ID, "row %s: no service has the identity %s", r.ID, dst)
		case !port:
			l.add(Unreachable, r.Origin, r.ID, "row %s: no service with the identity %s has port %s", r.ID, dst, r.Port)
		}
	}
}

// host finds allowed hosts that the gateway does not know how to reach.
func (l *linter) host(r *mesh.Rule, host string) {
	known := slices.ContainsFunc(l.p.Destinations, func(d mesh.Destination) bool {
		return d.Host == host || mesh.MatchHost(d.Host, host) || mesh.MatchHost(host, d.Host)
	})
	if !known {
		how := "it is reached as TLS at public addresses only"
		if _, err := netip.ParseAddr(host); err == nil {
			how = "the gateway refuses an address that is not listed there"
		}
		l.add(NoDestination, r.Origin, r.ID, "row %s allows %s, which egress.yaml does not describe: %s", r.ID, host, how)
	}
}

func (l *linter) groups() {
	used := map[string]bool{}
	for _, r := range l.p.Rules {
		used[r.Src], used[r.Dst] = true, true
	}
	for _, m := range l.p.Memberships {
		used[m.Member] = true
	}
	for _, m := range l.p.Memberships {
		if !used[m.Group] {
			l.add(UnusedGroup, m.Origin, m.Group, "no row names %s", m.Group)
			used[m.Group] = true // once is enough
		}
	}
}

func (l *linter) destinations() {
	for _, d := range l.p.Destinations {
		allowed := slices.ContainsFunc(l.p.Rules, func(r mesh.Rule) bool {
			if r.Dir != mesh.Out || r.Effect != mesh.Allow {
				return false
			}
			return slices.ContainsFunc(l.members.patterns(r.Dst), func(p string) bool {
				host := strings.TrimPrefix(p, "host:")
				return host == d.Host || mesh.MatchHost(host, d.Host) || mesh.MatchHost(d.Host, host)
			})
		})
		if !allowed {
			l.add(UnusedDestination, d.Origin, d.Host, "no row allows anyone to reach %s", d.Host)
		}
	}
}

func (l *linter) services() {
	for _, s := range l.p.Services {
		issued := slices.ContainsFunc(l.p.Entries, func(e mesh.Entry) bool { return e.SPIFFEID == s.ID })
		if !issued {
			l.add(NoEntry, s.Origin, string(s.Name), "no entry gives anyone the identity of service %s", s.Name)
		}
	}
}

// tests finds rows that no case is decided by, and cases that are decided by
// the hour at which they run.
func (l *linter) tests() {
	rep := Test(l.p)
	if rep.Broken != nil {
		return
	}
	for _, row := range rep.Rows {
		if row.Cases == 0 {
			l.add(Untested, row.Origin, row.ID, "no test is decided by row %s", row.ID)
		}
	}
	for _, c := range l.p.Cases {
		if !c.Now.IsZero() {
			continue
		}
		call, err := callOf(l.p, c)
		if err != nil {
			continue
		}
		for i := range l.p.Rules {
			r := &l.p.Rules[i]
			timed := strings.Contains(r.Cond, string(mesh.CondWhen)) || strings.Contains(r.Cond, string(mesh.CondUntil))
			if timed && r.Dir == call.Dir && l.members.matchSrc(r, call.Src.String()) && l.members.matchDst(r, call.Dst) &&
				mesh.MatchPort(r.Port, call.Port) && mesh.MatchVerb(r.Verb, call.Verb) && mesh.MatchPath(r.Path, call.Path) {
				l.add(TimeDependent, c.Origin, c.Name, "test %s depends on the hour at which it runs, by row %s: give it a time in now", strconv.Quote(c.Name), r.ID)
				break
			}
		}
	}
}
