package mesh

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Validate reports every mistake in the reviewed set, as Errors: values that
// mean nothing, names written twice, names that nothing defines.
func (p *Policies) Validate() error {
	v := validator{p: p}
	return v.run().orNil()
}

// A validator collects mistakes. With valuesOnly it leaves out what would be a
// false alarm when rows are missing because they could not be read.
type validator struct {
	p          *Policies
	valuesOnly bool
	// spoiled are fields that are written but could not be read, which is a
	// mistake already reported, by item.
	spoiled map[Origin]map[string]bool
	// partial is true of a projection, which leaves services out.
	partial bool
	// lone is true of an entry that is looked at without the others.
	lone bool
	// knownEntries is true of entries that were found good as they are.
	knownEntries bool
	// parents is filled when first asked for.
	parents map[spiffeid.ID]bool
	errs    Errors
}

func (v *validator) run() Errors {
	if v.p.TrustDomain.IsZero() {
		return Errors{{Msg: "trust domain is missing"}}
	}
	v.services()
	v.rules()
	v.memberships()
	v.destinations()
	v.routes()
	if !v.knownEntries {
		v.entries()
	}
	v.cases()
	v.adminRules()
	v.tokens()
	v.modes()
	if !v.valuesOnly {
		v.groups()
	}
	if len(v.errs) == 0 && !v.valuesOnly {
		v.rowsOfCandidate()
	}
	return v.errs
}

// item records a mistake in a YAML item, the caret at the text near.
func (v *validator) item(o Origin, near, format string, args ...any) {
	v.errs = append(v.errs, &Problem{File: o.File, Line: o.Line, near: near, Msg: fmt.Sprintf(format, args...)})
}

// missing records that an item lacks a field.
func (v *validator) missing(o Origin, field string) {
	if !v.spoiled[o][field] {
		v.item(o, "", "%s is missing", field)
	}
}

// cell records a mistake in a column of a CSV row.
func (v *validator) cell(o Origin, column int, format string, args ...any) {
	v.errs = append(v.errs, &Problem{File: o.File, Line: o.Line, field: column, Msg: fmt.Sprintf(format, args...)})
}

// twice reports a key seen before.
func twice[K comparable](v *validator, seen map[K]Origin, key K, o Origin, what string) {
	if first, ok := seen[key]; ok {
		where := ""
		if first != o {
			where = fmt.Sprintf(", first at %s", first)
		}
		v.item(o, fmt.Sprint(key), "%s %q is written twice%s", what, fmt.Sprint(key), where)
		return
	}
	seen[key] = o
}

// workloadID checks that an identity is one of ours and is a workload's.
func (v *validator) workloadID(o Origin, what string, id spiffeid.ID) {
	switch {
	case id.IsZero():
		v.missing(o, what)
	case !id.MemberOf(v.p.TrustDomain):
		v.item(o, id.String(), "%s %q is not in trust domain %q", what, id, v.p.TrustDomain.Name())
	case id.Path() == "":
		v.item(o, id.String(), "%s %q is the trust domain itself, not a workload", what, id)
	case id.Path() == "/spire" || strings.HasPrefix(id.Path(), "/spire/"):
		v.item(o, id.String(), "%s %q is under /spire, which is kept for agents and the issuer", what, id)
	}
}

func (v *validator) services() {
	names, ids := map[ServiceName]Origin{}, map[string]Origin{}
	for _, s := range v.p.Services {
		switch err := checkLabel(string(s.Name)); {
		case s.Name == "":
			v.missing(s.Origin, "name")
		case err != nil:
			v.item(s.Origin, string(s.Name), "name: %s", err)
		case looksNumeric(string(s.Name)):
			v.item(s.Origin, string(s.Name), "name %q could be read as an address", s.Name)
		default:
			twice(v, names, s.Name, s.Origin, "service")
		}
		v.workloadID(s.Origin, "identity", s.ID)
		if !s.ID.IsZero() {
			twice(v, ids, s.ID.String(), s.Origin, "identity")
		}
		if s.Port == 0 {
			v.missing(s.Origin, "port")
		}
		v.stream(s)
		if s.Audit != "" && s.Audit != AuditFull {
			v.item(s.Origin, s.Audit, "audit: %q is neither \"counted\" nor \"full\"", s.Audit)
		}
		if s.Fail != "" && s.Fail != FailOpen {
			v.item(s.Origin, s.Fail, "fail: %q is neither \"closed\" nor \"open\"", s.Fail)
		}
		if s.Audit == AuditFull && s.Fail == FailOpen {
			v.item(s.Origin, s.Fail, "fail: \"open\" contradicts audit: \"full\": what must be recorded must not happen unrecorded")
		}
	}
}

// longest bounds the limits of a stream, so that a slip of the unit is seen.
const longest = 30 * 24 * time.Hour

func (v *validator) stream(s Service) {
	x := s.Stream
	switch {
	case s.Protocol != HTTP && s.Protocol != TCP:
		v.item(s.Origin, s.Protocol, "unknown protocol %q%s", s.Protocol, didYouMean(s.Protocol, []string{HTTP, TCP}))
	case s.Protocol != TCP && x != Stream{}:
		v.item(s.Origin, "stream:", "stream has no meaning for protocol %s: leave it out, or write protocol: tcp", s.Protocol)
	case x.Idle < 0 || x.Idle > longest:
		v.item(s.Origin, "idle_timeout:", "idle_timeout %s is not from 0 to 720h", x.Idle)
	case x.Life < 0 || x.Life > longest:
		v.item(s.Origin, "max_life:", "max_life %s is not from 0 to 720h", x.Life)
	case x.Proxy != "" && x.Proxy != "v2":
		v.item(s.Origin, x.Proxy, "proxy_protocol: %q is not \"v2\"", x.Proxy)
	}
}

// private refuses ranges so wide that they mean "anything".
func (v *validator) private(o Origin, p netip.Prefix) {
	switch {
	case !p.IsValid() || p.Addr().Is4In6():
		v.item(o, p.String(), "private %q is not a range like 10.1.0.0/16", p)
	case p.Masked() != p:
		v.item(o, p.String(), "private %q has bits set behind its length: write %s", p, p.Masked())
	case p.Addr().Is4() && p.Bits() < 8 || p.Addr().Is6() && p.Bits() < 7:
		v.item(o, p.String(), "private %q is wider than any private range", p)
	}
}

// Longest lifetimes that an entry may ask for. The issuer's own limits stand
// above these.
const (
	maxX509TTL = 24 * time.Hour
	maxJWTTTL  = time.Hour
)

func (v *validator) entries() {
	seen := map[string]Origin{}
	for _, e := range v.p.Entries {
		v.workloadID(e.Origin, "spiffe_id", e.SPIFFEID)
		switch {
		case e.ParentID.IsZero():
			v.missing(e.Origin, "parent_id")
		case !e.ParentID.MemberOf(v.p.TrustDomain):
			v.item(e.Origin, e.ParentID.String(), "parent_id %q is not in trust domain %q", e.ParentID, v.p.TrustDomain.Name())
		case !v.mayBeParent(e.ParentID):
			v.item(e.Origin, e.ParentID.String(), "parent_id %q is neither an agent (/spire/agent/...) nor the issuer (%s), and no entry below one of these has it as its spiffe_id", e.ParentID, issuerPath)
		}
		if e.IsAlias() && (e.Admin || e.Downstream) {
			v.item(e.Origin, "", "a node alias can be neither admin nor downstream: nobody is given its identity")
		}
		v.selectors(e)
		if e.X509TTL < 0 || e.X509TTL > maxX509TTL || e.X509TTL > 0 && e.X509TTL < time.Second {
			v.item(e.Origin, "x509_ttl:", "x509_ttl %s is not from 1s to 24h", e.X509TTL)
		}
		if e.JWTTTL < 0 || e.JWTTTL > maxJWTTTL || e.JWTTTL > 0 && e.JWTTTL < time.Second {
			v.item(e.Origin, "jwt_ttl:", "jwt_ttl %s is not from 1s to 1h", e.JWTTTL)
		}
		names := map[string]Origin{}
		for _, n := range e.DNSNames {
			if err := CheckHost(n); err != nil {
				v.item(e.Origin, n, "dns_names: %s", err)
				continue
			}
			twice(v, names, n, e.Origin, "DNS name")
		}
		v.federatesWith(e)
		if len(e.Hint) > 64 {
			v.item(e.Origin, "hint:", "hint has %d characters, more than 64", len(e.Hint))
		}
		if !plainWord(e.ID, 64) {
			v.item(e.Origin, "id:", "id %q is not 1 to 64 letters, digits, hyphens, dots or underscores", clip(e.ID))
			continue
		}
		if first, ok := seen[e.ID]; ok {
			v.item(e.Origin, "", "entry is written twice, first at %s: same parent, identity and selectors, or same id", first)
		}
		seen[e.ID] = e.Origin
	}
}

// mayBeParent reports whether something can come of an entry below id. Without
// the other entries that is not known.
func (v *validator) mayBeParent(id spiffeid.ID) bool {
	if strings.HasPrefix(id.Path(), agentPath) || id.Path() == issuerPath {
		return true
	}
	if v.lone || v.valuesOnly {
		return id.Path() != "" && id.Path() != "/spire" && !strings.HasPrefix(id.Path(), "/spire/")
	}
	if v.parents == nil {
		v.parents = parents(v.p.Entries)
	}
	return v.parents[id]
}

// parents are the identities of entries that an agent or the issuer is above.
func parents(entries []Entry) map[spiffeid.ID]bool {
	l, out := NewLineage(entries), map[spiffeid.ID]bool{}
	var open []spiffeid.ID
	add := func(e Entry) {
		if !out[e.SPIFFEID] {
			out[e.SPIFFEID] = true
			open = append(open, e.SPIFFEID)
		}
	}
	for _, e := range entries {
		if e.IsAlias() || strings.HasPrefix(e.ParentID.Path(), agentPath) {
			add(e)
		}
	}
	for len(open) > 0 {
		id := open[len(open)-1]
		open = open[:len(open)-1]
		for _, e := range l.children[id] {
			add(e)
		}
	}
	return out
}

func (v *validator) federatesWith(e Entry) {
	domains := map[spiffeid.TrustDomain]Origin{}
	for _, td := range e.FederatesWith {
		if td == v.p.TrustDomain {
			v.item(e.Origin, "federates_with:", "federates_with %q is this trust domain: its bundle needs no mention", td.Name())
			continue
		}
		twice(v, domains, td, e.Origin, "trust domain")
	}
}

func (v *validator) selectors(e Entry) {
	if len(e.Selectors) == 0 {
		if !v.spoiled[e.Origin]["selectors"] {
			every := "process"
			if e.IsAlias() {
				every = "node"
			}
			v.item(e.Origin, "selectors:", "selectors are missing: an entry without any would match every %s", every)
		}
		return
	}
	strong := e.IsAlias()
	seen := map[string]Origin{}
	for _, s := range e.Selectors {
		if err := s.Check(); err != nil {
			v.item(e.Origin, s.String(), "%s", err)
		} else if s.OfNode() && !e.IsAlias() {
			v.item(e.Origin, s.String(), "selector %q is a fact of a node: it belongs to a node alias, whose parent_id is the issuer (%s)", s, issuerPath)
		} else if e.IsAlias() && !s.OfNode() {
			v.item(e.Origin, s.String(), "selector %q is a fact of a process: parent_id %s makes a node alias, whose selectors are facts of nodes, such as x509pop:subject:cn:web-1", s, issuerPath)
		} else {
			twice(v, seen, s.String(), e.Origin, "selector")
		}
		strong = strong || !s.Weak()
	}
	if !strong && !e.WeakSelectors && !v.spoiled[e.Origin]["weak_selectors"] && !v.spoiled[e.Origin]["selectors"] {
		v.item(e.Origin, e.Selectors[0].String(), "selector %q alone is no boundary, any process can run that file: add a uid, gid or cgroup, or write weak_selectors: allow", e.Selectors[0])
	}
}

// plainWord accepts identifiers that are safe as metric labels.
func plainWord(s string, longest int) bool {
	if s == "" || len(s) > longest {
		return false
	}
	for i := range len(s) {
		c := s[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '-' && c != '.' && c != '_') {
			return false
		}
	}
	return true
}
