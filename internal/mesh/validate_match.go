package mesh

import (
	"fmt"
	"regexp"
	"regexp/syntax"
	"slices"
	"strings"
)

// matches checks conditions of a route, a fault or a shadow.
func (c *routeChecker) matches(field string, list []Match) {
	if len(list) > maxMatches {
		c.say(field+":", "%s: %d are more than %d", field, len(list), maxMatches)
	}
	for i := range list {
		c.match(field, &list[i])
	}
}

func (c *routeChecker) match(field string, m *Match) {
	if m.empty() {
		c.say(field+":", "%s: an item says nothing: leave it out to match every call", field)
	}
	if c.tcp && (m.Path != nil || m.Method != "" || len(m.Headers) > 0 || len(m.Query) > 0 || m.GRPC != nil || len(m.Claims) > 0 || m.Region != nil && m.Region.ofHTTP()) {
		c.say(field+":", "%s: the service speaks tcp: a connection has a caller and an address, and no more", field)
		return
	}
	if m.Path != nil {
		c.path(m.Path)
	}
	if m.Method != "" && (!slices.Contains(verbs, m.Method) || m.Method == "CONNECT") {
		c.say(m.Method, "method: unknown %q%s", clip(m.Method), didYouMean(strings.ToUpper(m.Method), verbs))
	}
	c.named("headers", m.Headers, checkFieldName)
	c.named("query", m.Query, func(name string) error {
		if name == "" || len(name) > 256 {
			return fmt.Errorf("name %q is empty or too long", clip(name))
		}
		return nil
	})
	if g := m.GRPC; g != nil {
		if m.Path != nil {
			c.say("grpc:", "grpc and path are both there: a method of gRPC is a path")
		}
		c.grpc(g)
	}
	c.from("from", m.From)
	if len(m.Claims) > 0 || m.Region != nil && m.Region.Claim != "" {
		c.claims("claims")
	}
	if len(m.Claims) > maxNamed {
		c.say("claims:", "claims: %d are more than %d", len(m.Claims), maxNamed)
	}
	for _, name := range sortedKeys(m.Claims) {
		if name == "" || m.Claims[name] == "" {
			c.say("claims:", "claims: %q has no name or no value", clip(name))
		}
	}
	if m.Region != nil {
		c.region(m.Region)
	}
}

// claims refuses what is by a claim where no token could hold one.
func (c *routeChecker) claims(field string) {
	svc := c.known[c.file.Service]
	switch {
	case c.file.Host != "":
		c.say(field+":", "%s: a claim is of a token for a service of the mesh: calls to %s show none that counts", field, c.file.Host)
	case svc == nil || c.partial || c.valuesOnly:
	case c.p.Tokens.shown(map[ServiceName][]Rule{svc.Name: newGroups(c.p.Memberships).about(c.p.Rules, *svc)}) == nil:
		c.say(field+":", "%s: no token counts at service %q: name the service at an issuer of %s, or ask for a token in a row about it", field, svc.Name, tokensFile)
	}
}

func (m *Match) empty() bool {
	return m.Path == nil && m.Method == "" && len(m.Headers)+len(m.Query)+len(m.From)+len(m.Claims) == 0 && m.GRPC == nil && m.Region == nil
}

// notYet refuses what is well written, and what no proxy acts on: it would be in
// force without any effect.
func (c *routeChecker) notYet(near, what, instead string) {
	if c.partial {
		return // a proxy may be newer than we are
	}
	c.say(near, "%s is not looked at by this version: %s", what, instead)
}

// path checks how the path of a call is compared: in its normal form.
func (c *routeChecker) path(t *Text) {
	if t.Suffix != "" || t.Present || t.Not {
		c.say("path:", "path: want one of exact, prefix and regex")
		return
	}
	c.text("path", t)
	s := t.Exact + t.Prefix
	if s == "" || t.Regex != "" {
		return
	}
	if s[0] != '/' {
		c.say(s, "path: %q does not start with \"/\"", clip(s))
	} else if err := checkPathForm(s); err != nil {
		c.say(s, "path: %q never matches: %s", clip(s), err)
	}
}

// text checks that exactly one comparison is written.
func (c *routeChecker) text(what string, t *Text) {
	n := 0
	for _, s := range []string{t.Exact, t.Prefix, t.Suffix, t.Regex} {
		if s != "" {
			n++
		}
		if len(s) > maxPattern {
			c.say("", "%s: a text of %d characters is longer than %d", what, len(s), maxPattern)
		}
	}
	if t.Present {
		n++
	}
	if n != 1 {
		c.say(what[strings.LastIndexByte(what, ' ')+1:], "%s: %d comparisons, want exactly one of exact, prefix, suffix, regex and present", what, n)
	}
	if t.Regex == "" {
		return
	}
	if c.patterns++; c.patterns > maxRoutes {
		c.say(t.Regex, "%s: more than %d regular expressions in all routes", what, maxRoutes)
	}
	if _, err := CompileText(t.Regex); err != nil {
		c.say(t.Regex, "%s: %s", what, err)
	}
}

// maxInst bounds the instructions of a compiled regular expression.
const maxInst = 4096

// CompileText compiles a regular expression that must match a whole value.
func CompileText(expr string) (*regexp.Regexp, error) {
	re, err := syntax.Parse(expr, syntax.Perl) // by itself: a ")" must not end our group
	if err != nil {
		return nil, fmt.Errorf("regex %q: %w", clip(expr), err)
	}
	// Every proxy keeps it: a repetition in a repetition is a large machine.
	if prog, err := syntax.Compile(re.Simplify()); err != nil || len(prog.Inst) > maxInst {
		return nil, fmt.Errorf("regex %q is too large: it has repetitions in repetitions", clip(expr))
	}
	return regexp.Compile(`^(?s:(?-s:` + expr + `))$`)
}

func (c *routeChecker) named(field string, list []NamedText, check func(string) error) {
	if len(list) > maxNamed {
		c.say(field+":", "%s: %d are more than %d", field, len(list), maxNamed)
	}
	seen := map[string]bool{}
	for i := range list {
		n := &list[i]
		key := n.Name
		if field == "headers" {
			key = strings.ToLower(key)
		}
		if err := check(n.Name); err != nil {
			c.say(field+":", "%s: %s", field, err)
			continue
		}
		if seen[key] {
			c.say(n.Name, "%s: %q is written twice", field, clip(n.Name))
		}
		seen[key] = true
		c.text(field+": "+n.Name, &n.Text)
	}
}

// checkFieldName accepts the name of a header field.
func checkFieldName(name string) error {
	if !isToken(name) || len(name) > 128 {
		return fmt.Errorf("%q is not the name of a header field", clip(name))
	}
	return nil
}

// isToken reports a token of RFC 9110, section 5.6.2.
func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
			return false
		}
	}
	return s != ""
}

func (c *routeChecker) grpc(g *GRPCMethod) {
	if g.Service == "" && g.Method == "" {
		c.say("grpc:", "grpc: service and method are missing, one of them is wanted")
	}
	for part := range strings.SplitSeq(g.Service, ".") {
		if g.Service != "" && !isIdentifier(part) {
			c.say(g.Service, "grpc: %q is not the name of a service, such as shop.v1.Billing", clip(g.Service))
			break
		}
	}
	if g.Method != "" && !isIdentifier(g.Method) {
		c.say(g.Method, "grpc: %q is not the name of a method", clip(g.Method))
	}
}

func isIdentifier(s string) bool {
	return plainWord(s, 128) && !strings.ContainsAny(s, "-.")
}

// from checks patterns of callers, which a group may stand for.
func (c *routeChecker) from(field string, list []string) {
	if len(list) > maxMatches {
		c.say(field+":", "%s: %d are more than %d", field, len(list), maxMatches)
	}
	for _, s := range list {
		if err := checkSrc(s); err != nil {
			c.say(s, "%s: %s", field, err)
		} else if IsGroup(s) && !c.groups[s] && !c.partial && !c.valuesOnly {
			hint := ": no row makes anyone a member of it"
			if n := nearest(s, sortedKeys(c.groups)); n != "" {
				hint = fmt.Sprintf(": did you mean %q?", n)
			}
			c.say(s, "%s: unknown group %q%s", field, clip(s), hint)
		}
	}
}

// ofHTTP says whether the region stands in a request.
func (r *Region) ofHTTP() bool { return r.Header != "" || r.Claim != "" }

var databaseName = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,62}$`)

// CheckDatabaseName says what is wrong with the name of a database of regions,
// which routes and sidecars call it by.
func CheckDatabaseName(name string) error {
	if !databaseName.MatchString(name) {
		return fmt.Errorf("%q is not a name of lower-case letters, digits, \"-\" and \"_\"", clip(name))
	}
	return nil
}

func (c *routeChecker) region(r *Region) {
	n := 0
	for _, there := range []bool{r.Header != "", r.Claim != "", len(r.Ranges) > 0, r.Database != ""} {
		if there {
			n++
		}
	}
	if n != 1 {
		c.say("region:", "region: %d sources, want exactly one of header, claim, ranges and database", n)
	}
	if len(r.In) == 0 || slices.Contains(r.In, "") || len(r.In) > maxMatches {
		c.say("region:", "region: in names no region, an empty one, or more than %d", maxMatches)
	}
	if r.Header != "" {
		if err := checkFieldName(r.Header); err != nil {
			c.say(r.Header, "region: %s", err)
		}
	}
	if r.Database != "" {
		if err := CheckDatabaseName(r.Database); err != nil {
			c.say(r.Database, "region: database: %s; sidecars say under regions which file has it", err)
		}
	}
	total := 0
	for _, name := range sortedKeys(r.Ranges) {
		total += len(r.Ranges[name])
		for _, p := range r.Ranges[name] {
			if !p.IsValid() || p.Masked() != p || p.Addr().Is4In6() {
				c.say(p.String(), "region: %q is not a range like 10.1.0.0/16", p)
			}
		}
	}
	if total > maxKeys {
		c.say("ranges:", "region: %d ranges are more than %d: use a database", total, maxKeys)
	}
	for _, name := range r.In {
		if len(r.Ranges) > 0 && r.Ranges[name] == nil {
			c.say(name, "region: %q has no ranges%s", clip(name), didYouMean(name, sortedKeys(r.Ranges)))
		}
	}
}
