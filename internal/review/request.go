package review

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/authz"
	"sallyport/internal/mesh"
)

// requestForm is what ParseRequest reads.
const requestForm = "FROM -> TO[:PORT] VERB PATH [sni=HOST] [token(WORD...)] [env=NAME] [at TIME]"

// ParseRequest reads a call as people write it and as a Witness is printed:
//
//	payment -> billing:8443 POST /v1/charges token(iss=https://ci.example) at 2026-11-23T10:00:00Z
//	out spiffe://demo.sallyport/ns/shop/sa/billing -> host:api.stripe.test:443 CONNECT - sni=api.stripe.test
//
// FROM and TO may be names of services. The direction may be left out, as may
// the port of a service, 443 of a host, and verb and path of a tunnel.
func ParseRequest(p *mesh.Policies, text string, now time.Time) (*authz.Call, error) {
	words, token, hasToken, err := cutToken(text)
	if err != nil {
		return nil, err
	}
	if len(words) > 0 && (words[0] == string(mesh.In) || words[0] == string(mesh.Out)) {
		words = words[1:]
	}
	if len(words) < 3 || words[1] != "->" {
		return nil, fmt.Errorf("a request is written %s", requestForm)
	}
	c := &authz.Call{Now: now, Verb: "CONNECT", Path: "-"}
	if c.Src, err = Caller(p, words[0]); err != nil {
		return nil, err
	}
	if err := target(p, c, words[2]); err != nil {
		return nil, err
	}
	words = words[3:]
	if len(words) >= 2 && !strings.Contains(words[0], "=") {
		c.Verb, c.Path, words = words[0], words[1], words[2:]
	} else if c.Dir == mesh.In {
		return nil, fmt.Errorf("verb and path are missing: a request is written %s", requestForm)
	}
	for len(words) > 0 {
		name, value, _ := strings.Cut(words[0], "=")
		switch {
		case name == "sni":
			c.SNI = value
		case name == "env":
			c.Environment = value
		case name == "at" && len(words) > 1:
			if c.Now, err = time.Parse(time.RFC3339, words[1]); err != nil {
				return nil, fmt.Errorf("%q is not a time such as 2026-11-23T10:00:00Z", words[1])
			}
			words = words[1:]
		default:
			return nil, fmt.Errorf("%q does not belong to a request: it is written %s", words[0], requestForm)
		}
		words = words[1:]
	}
	if hasToken {
		if c.Token, err = tokenFrom(token); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// cutToken takes "token(...)" out of a request.
func cutToken(text string) (words []string, token string, found bool, err error) {
	before, rest, found := strings.Cut(text, "token(")
	if !found {
		return strings.Fields(text), "", false, nil
	}
	end := strings.LastIndexByte(rest, ')') // a claim may have one, too
	if end < 0 {
		return nil, "", false, errors.New("token( is not closed by a bracket")
	}
	return strings.Fields(before + " " + rest[end+1:]), rest[:end], true, nil
}

// Caller reads the name of a service or a SPIFFE ID.
func Caller(p *mesh.Policies, name string) (spiffeid.ID, error) {
	for i := range p.Services {
		if string(p.Services[i].Name) == name {
			return p.Services[i].ID, nil
		}
	}
	id, err := spiffeid.FromString(name)
	if err != nil {
		return id, fmt.Errorf("%q is neither a SPIFFE ID nor a service", name)
	}
	return id, nil
}

// target reads where a call goes, with or without its port.
func target(p *mesh.Policies, c *authz.Call, text string) error {
	name := text
	if i := strings.LastIndexByte(text, ':'); i > 0 {
		if n, err := strconv.ParseUint(text[i+1:], 10, 16); err == nil && n > 0 {
			name, c.Port = text[:i], uint16(n)
		}
	}
	dir, dst, err := p.Target(mesh.Case{To: name})
	if err != nil {
		return err
	}
	c.Dir, c.Dst = dir, dst
	if c.Port != 0 {
		return nil
	}
	if c.Dir == mesh.Out {
		c.Port = 443
		return nil
	}
	for i := range p.Services {
		if p.Services[i].ID.String() == dst {
			c.Port = p.Services[i].Port
			return nil
		}
	}
	return fmt.Errorf("%s is no service: write its port, as in %s:8443", name, name)
}

// tokenFrom reads what a token says in the words of conditions.
func tokenFrom(text string) (*authz.Token, error) {
	t := newToken()
	if strings.TrimSpace(text) == noneOfThem {
		return t, nil
	}
	for _, w := range strings.Fields(text) {
		cs, err := mesh.ParseCond(w)
		if err != nil {
			return nil, fmt.Errorf("token: %w", err)
		}
		if !cs[0].NeedsToken() {
			return nil, fmt.Errorf("token: %q does not speak of a token", w)
		}
		say(t, &cs[0])
	}
	return t, nil
}
