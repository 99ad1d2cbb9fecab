package mesh

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Prefixes of group names in rows.
const (
	callerPrefix  = "group:"
	servicePrefix = "svcs:"
	hostPrefix    = "hosts:"
)

// IsGroup reports whether a source or destination of a row names a group.
func IsGroup(ref string) bool {
	return strings.HasPrefix(ref, callerPrefix) || strings.HasPrefix(ref, servicePrefix) || strings.HasPrefix(ref, hostPrefix)
}

func (v *validator) rules() {
	seen, tcp := map[string]Origin{}, v.p.streams()
	for _, r := range v.p.Rules {
		for _, c := range v.p.checkRule(r) {
			v.cell(r.Origin, c.column, "%s", c.err)
		}
		if tcp[r.Dst] && r.Dir == In && r.Effect == Allow {
			v.streamRule(r)
		}
		if first, ok := seen[r.ID]; ok {
			v.cell(r.Origin, colID, "id %q is written twice, first at %s", r.ID, first)
			continue
		}
		seen[r.ID] = r.Origin
	}
}

// streams are the identities of the TCP services.
func (p *Policies) streams() map[string]bool {
	out := map[string]bool{}
	for _, s := range p.Services {
		if s.Protocol == TCP && !s.ID.IsZero() {
			out[s.ID.String()] = true
		}
	}
	return out
}

// streamRule refuses a row that can allow nothing at a TCP service.
func (v *validator) streamRule(r Rule) {
	if r.Verb != "CONNECT" && r.Verb != "*" {
		v.cell(r.Origin, colVerb, "verb %q never matches: the destination speaks tcp, whose connections are judged as CONNECT with path \"-\"", clip(r.Verb))
	}
	conds, _ := ParseCond(r.Cond) // its mistakes are told elsewhere
	for _, c := range conds {
		if c.NeedsToken() {
			v.cell(r.Origin, colCond, "condition %q never holds: the destination speaks tcp, and a connection shows no token", string(c.Word)+c.Key+c.Value)
		}
	}
}

type cellError struct {
	column int
	err    error
}

// checkRule checks each column of a row, and those that must fit each other.
func (p *Policies) checkRule(r Rule) []cellError {
	var errs []cellError
	check := func(column int, err error) {
		if err != nil {
			errs = append(errs, cellError{column, err})
		}
	}
	if !plainWord(r.ID, 64) {
		check(colID, fmt.Errorf("id %q is not 1 to 64 letters, digits, hyphens, dots or underscores", clip(r.ID)))
	}
	check(colDir, oneOf("direction", string(r.Dir), string(In), string(Out)))
	check(colSrc, checkSrc(r.Src))
	check(colDst, p.checkDst(r.Dir, r.Dst))
	check(colPort, checkPort(r.Port))
	check(colVerb, checkVerb(r.Verb))
	check(colPath, checkPath(r.Verb, r.Path))
	conds, err := ParseCond(r.Cond)
	check(colCond, err)
	for _, c := range conds {
		if c.Word == CondSNI && r.Dir == In {
			check(colCond, fmt.Errorf("condition %q speaks of egress: it is only possible with direction out", string(c.Word)+c.Value))
		}
	}
	check(colEffect, oneOf("effect", string(r.Effect), string(Allow), string(Deny)))
	return errs
}

func oneOf(what, s string, known ...string) error {
	if slices.Contains(known, s) {
		return nil
	}
	return fmt.Errorf("unknown %s %q%s", what, clip(s), didYouMean(strings.ToLower(s), known))
}

func checkSrc(s string) error {
	if s == Any {
		return nil
	}
	if s == "*" {
		return errors.New(`source "*" is ambiguous: write "**" for every workload`)
	}
	if strings.HasPrefix(s, callerPrefix) {
		return checkGroup(s)
	}
	if strings.HasPrefix(s, servicePrefix) || strings.HasPrefix(s, hostPrefix) {
		return fmt.Errorf("source %q is a group of destinations: callers are in group:", clip(s))
	}
	return CheckIDPattern(s)
}

func checkGroup(ref string) error {
	_, name, _ := strings.Cut(ref, ":")
	if !plainWord(name, 64) {
		return fmt.Errorf("group %q: its name is 1 to 64 letters, digits, hyphens, dots or underscores", clip(ref))
	}
	return nil
}

func (p *Policies) checkDst(dir Direction, s string) error {
	host, isHost := strings.CutPrefix(s, "host:")
	switch {
	case strings.HasPrefix(s, callerPrefix):
		return fmt.Errorf("destination %q is a group of callers: destinations are in svcs: or hosts:", clip(s))
	case dir == Out && strings.HasPrefix(s, hostPrefix), dir == In && strings.HasPrefix(s, servicePrefix):
		return checkGroup(s)
	case dir == Out && isHost:
		return CheckHostRef(host)
	case dir == Out:
		return fmt.Errorf("destination %q of direction out is not host:NAME or hosts:GROUP", clip(s))
	case isHost || strings.HasPrefix(s, hostPrefix):
		return fmt.Errorf("destination %q of direction in is a host: hosts are reached with direction out", clip(s))
	case s == "*" || s == Any:
		return nil
	}
	if err := CheckIDPattern(s); err != nil {
		return err
	}
	if rest := strings.TrimPrefix(s, "spiffe://"+p.TrustDomain.Name()+"/"); rest == s {
		return fmt.Errorf("destination %q is not in trust domain %q", clip(s), p.TrustDomain.Name())
	}
	return nil
}

func checkPort(s string) error {
	if s == "*" {
		return nil
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || strconv.FormatUint(n, 10) != s {
		return fmt.Errorf("port %q is neither a number from 1 to 65535 nor *", clip(s))
	}
	return nil
}

// verbs is the closed list of methods that a row may name. A method outside of
// it is matched by "*" only.
var verbs = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}

func checkVerb(s string) error {
	if s == "*" {
		return nil
	}
	seen := map[string]bool{}
	for v := range strings.SplitSeq(s, "|") {
		if !slices.Contains(verbs, v) {
			return fmt.Errorf("unknown verb %q%s", clip(v), didYouMean(strings.ToUpper(v), verbs))
		}
		if seen[v] {
			return fmt.Errorf("verb %q is written twice", v)
		}
		seen[v] = true
	}
	if seen["CONNECT"] && len(seen) > 1 {
		return errors.New("CONNECT has no path and stands in a row of its own")
	}
	return nil
}

func checkPath(verb, s string) error {
	switch {
	case s == Any:
		return nil
	case s == "-" && verb == "CONNECT":
		return nil
	case s == "-":
		return errors.New(`path "-" is only possible with verb CONNECT: write "**" for every path`)
	case verb == "CONNECT":
		return fmt.Errorf(`path %q never matches: CONNECT has no path, write "-"`, clip(s))
	case !strings.HasPrefix(s, "/"):
		return fmt.Errorf(`path %q does not start with "/"`, clip(s))
	}
	if err := checkSegments(s[1:]); err != nil {
		return fmt.Errorf("path %q: %w", clip(s), err)
	}
	if err := checkPathForm(s); err != nil {
		return fmt.Errorf("path %q never matches: %w", clip(s), err)
	}
	return nil
}

// checkPathForm refuses what a judged path never holds: paths are judged in
// their normal form.
func checkPathForm(s string) error {
	if strings.Contains(s, "//") {
		return errors.New(`"//" is merged before paths are judged`)
	}
	for seg := range strings.SplitSeq(s[1:], "/") {
		if seg == "." || seg == ".." {
			return errors.New("dot segments are dropped before paths are judged")
		}
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c <= ' ' || c >= 0x7f || strings.IndexByte("\\?#;\"<>^`{|}", c) >= 0:
			return fmt.Errorf("%q is not possible in a path", string(rune(c)))
		case c == '%':
			if err := checkEscape(s[i:]); err != nil {
				return err
			}
			i += 2
		}
	}
	return nil
}

// checkEscape accepts an escape in normal form: capital hex digits, and not a
// character that would be decoded or that is refused in escaped form.
func checkEscape(s string) error {
	const upperHex = "0123456789ABCDEF"
	if len(s) < 3 || strings.IndexByte(upperHex, s[1]) < 0 || strings.IndexByte(upperHex, s[2]) < 0 {
		return errors.New("an escape is % and two capital hex digits")
	}
	n, _ := strconv.ParseUint(s[1:3], 16, 8)
	c := byte(n)
	unreserved := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~", c) >= 0
	if unreserved {
		return fmt.Errorf("%s is decoded before paths are judged: write %q", s[:3], string(rune(c)))
	}
	if c < ' ' || c == 0x7f || c == '/' || c == '\\' {
		return fmt.Errorf("requests with %s in the path are refused", s[:3])
	}
	return nil
}
