package mesh

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// caller reads the "from" of a case: a service name or a SPIFFE ID.
func caller(s string, services []Service) (spiffeid.ID, error) {
	if strings.HasPrefix(s, "spiffe://") {
		id, err := spiffeid.FromString(s)
		if err != nil {
			return spiffeid.ID{}, fmt.Errorf("from %q: %w", clip(s), err)
		}
		return id, nil
	}
	for _, svc := range services {
		if string(svc.Name) == s {
			return svc.ID, nil
		}
	}
	return spiffeid.ID{}, fmt.Errorf("from %q is neither a SPIFFE ID nor a service%s", clip(s), serviceHint(s, services))
}

func serviceHint(s string, services []Service) string {
	names := make([]string, len(services))
	for i, svc := range services {
		names[i] = string(svc.Name)
	}
	if n := nearest(s, names); n != "" {
		return fmt.Sprintf(": did you mean %q?", n)
	}
	return ""
}

// Target says what a case calls: the direction, and the destination as rows
// are matched against it, a SPIFFE ID or "host:" and a name.
func (p *Policies) Target(c Case) (Direction, string, error) {
	if host, ok := strings.CutPrefix(c.To, "host:"); ok {
		if err := CheckHostRef(host); err != nil {
			return "", "", err
		}
		if strings.HasPrefix(host, "*") {
			return "", "", fmt.Errorf("to %q is a pattern: a case calls one host", clip(c.To))
		}
		return Out, c.To, nil
	}
	if strings.HasPrefix(c.To, "spiffe://") {
		id, err := spiffeid.FromString(c.To)
		if err != nil {
			return "", "", fmt.Errorf("to %q: %w", clip(c.To), err)
		}
		return In, id.String(), nil
	}
	for _, s := range p.Services {
		if string(s.Name) == c.To {
			return In, s.ID.String(), nil
		}
	}
	if c.To == "" {
		return "", "", errors.New("to is missing")
	}
	return "", "", fmt.Errorf("to %q is neither a service, a SPIFFE ID nor host:NAME%s", clip(c.To), serviceHint(c.To, p.Services))
}

func (v *validator) cases() {
	type key struct{ file, name string }
	seen := map[key]Origin{}
	rules := map[string]bool{}
	for _, r := range v.p.Rules {
		rules[r.ID] = true
	}
	for _, c := range v.p.Cases {
		if c.Name == "" {
			v.missing(c.Origin, "name")
		} else if first, ok := seen[key{c.Origin.File, c.Name}]; ok {
			v.item(c.Origin, c.Name, "test %q is written twice, first at %s", clip(c.Name), first)
		} else {
			seen[key{c.Origin.File, c.Name}] = c.Origin
		}
		if c.From.IsZero() {
			v.missing(c.Origin, "from")
		}
		if !v.valuesOnly {
			v.call(c)
		}
		if err := oneOf("want", string(c.Want), string(Allow), string(Deny)); c.Want == "" {
			v.missing(c.Origin, "want")
		} else if err != nil {
			v.item(c.Origin, "want:", "%s", err)
		}
		if c.Rule != "" && !rules[c.Rule] && !v.valuesOnly {
			hint := ""
			if n := nearest(c.Rule, sortedKeys(rules)); n != "" {
				hint = fmt.Sprintf(": did you mean %q?", n)
			}
			v.item(c.Origin, "rule:", "no row has the id %q%s", clip(c.Rule), hint)
		}
	}
}

// call checks that the call of a case is one that could be made.
func (v *validator) call(c Case) {
	dir, _, err := v.p.Target(c)
	if err != nil {
		v.item(c.Origin, "to:", "%s", err)
		return
	}
	if c.Port == 0 {
		v.item(c.Origin, "", "port is missing: only a service has one of its own")
	}
	switch {
	case c.Verb == "":
		v.missing(c.Origin, "verb")
	case !slices.Contains(verbs, c.Verb):
		v.item(c.Origin, "verb:", "unknown verb %q%s", clip(c.Verb), didYouMean(strings.ToUpper(c.Verb), verbs))
	case c.Verb == "CONNECT" && c.Path != "-":
		v.item(c.Origin, "path:", `CONNECT has no path: write path: "-"`)
	case c.Verb != "CONNECT" && !strings.HasPrefix(c.Path, "/"):
		v.item(c.Origin, "path:", `path %q does not start with "/"`, clip(c.Path))
	}
	if len(c.Way) > 0 && dir == In {
		v.item(c.Origin, "way:", "way speaks of egress: it is only possible with to: host:NAME")
	}
	if c.SNI == "" {
		return
	}
	if dir == In {
		v.item(c.Origin, "sni:", "sni speaks of egress: it is only possible with to: host:NAME")
	} else if err := CheckHost(c.SNI); err != nil {
		v.item(c.Origin, "sni:", "sni: %s", err)
	}
}
