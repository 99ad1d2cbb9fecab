package conform

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"strings"
)

// nameMusts are the demands on the form of a SPIFFE ID.
var nameMusts = []int{1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13}

// nameFaults holds a SPIFFE ID, as it was written, to each of nameMusts. It
// reads the text itself, because a URL parser has already mended some faults.
func nameFaults(id string) map[int]error {
	bad := map[int]error{}
	rest, ok := strings.CutPrefix(id, "spiffe://")
	if !ok {
		bad[1] = errors.New("it does not begin with spiffe://")
		if _, after, has := strings.Cut(id, "://"); has {
			rest = after
		}
	}
	if i := strings.IndexByte(rest, '#'); i >= 0 {
		bad[3] = errors.New("it has a fragment")
		rest = rest[:i]
	}
	if i := strings.IndexByte(rest, '?'); i >= 0 {
		bad[2] = errors.New("it has a query")
		rest = rest[:i]
	}
	td, _, _ := strings.Cut(rest, "/")
	if len(id) > 2048 || len(td) > 255 {
		bad[13] = fmt.Errorf("it has %d bytes, its trust domain %d", len(id), len(td))
	}
	if i := strings.LastIndexByte(td, '@'); i >= 0 {
		bad[4] = errors.New("it has a user")
		td = td[i+1:]
	}
	if host, _, has := strings.Cut(td, ":"); has {
		bad[4] = errors.New("it has a port")
		td = host
	}
	if td == "" {
		bad[1] = errors.New("it has no trust domain")
	}
	if strings.ToLower(td) != td {
		bad[5] = errors.New("its trust domain is not in lower case")
	}
	if strings.Contains(td, "%") {
		bad[7] = errors.New("its trust domain has a percent sign")
	}
	if strings.Trim(strings.ReplaceAll(strings.ToLower(td), "%", ""), "abcdefghijklmnopqrstuvwxyz0123456789.-_") != "" {
		bad[6] = errors.New("its trust domain has another character than a to z, 0 to 9, dot, dash and underscore")
	}
	_, p, has := strings.Cut(rest, "/")
	if has {
		pathFaults(p, bad)
	}
	return bad
}

// pathFaults looks at what stands behind the first slash.
func pathFaults(p string, bad map[int]error) {
	segments := strings.Split(p, "/")
	if last := len(segments) - 1; segments[last] == "" {
		bad[11] = errors.New("it ends with a slash")
		segments = segments[:last]
	}
	for _, s := range segments {
		if s == "" || s == "." || s == ".." {
			bad[10] = errors.New("its path has a segment that is empty or has dots alone")
		}
		if strings.Contains(s, "%") {
			bad[9] = errors.New("its path has a percent sign")
		}
		clean := strings.Map(func(r rune) rune {
			if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune(".-_%", r) {
				return -1
			}
			return r
		}, s)
		if clean != "" {
			bad[12] = errors.New("its path has another character than letters, digits, dot, dash and underscore")
		}
	}
}

// name notes the form of an ID that the implementation made.
func (r *report) name(id string) {
	bad := nameFaults(id)
	for _, m := range nameMusts {
		r.say(fmt.Sprintf("the ID %.100q", id), bad[m], m)
	}
}

// A badName is a text that is no SPIFFE ID, and the demand that says so. TD
// stands for the trust domain.
type badName struct {
	must int
	text string
}

var badNames = []badName{
	{1, "https://TD/conform"}, {1, "spiffe:///conform"}, {1, "/conform"},
	{2, "spiffe://TD/conform?a=b"}, {2, "spiffe://TD/conform?"}, {3, "spiffe://TD/conform#a"},
	{4, "spiffe://user@TD/conform"}, {4, "spiffe://TD:8443/conform"},
	{6, "spiffe://TD!x/conform"}, {7, "spiffe://%61TD/conform"},
	{9, "spiffe://TD/%63onform"}, {10, "spiffe://TD//conform"}, {10, "spiffe://TD/a/../conform"}, {10, "spiffe://TD/./conform"},
	{11, "spiffe://TD/conform/"}, {12, "spiffe://TD/con form"}, {12, "spiffe://TD/con,form"}, {12, "spiffe://TD/confoßrm"},
}

func (b badName) of(td string) string { return strings.Replace(b.text, "TD", td, 1) }

// longName is an ID of just 2048 bytes.
func longName(td string) string {
	head := "spiffe://" + td + "/conform/"
	return head + strings.Repeat("a", 2048-len(head))
}

// Target turns the address of a Workload API, as SPIFFE Workload Endpoint
// section 4 has it, into a gRPC target. A bare absolute path is taken for a
// Unix socket.
func Target(address string) (string, error) {
	if path.IsAbs(address) {
		return "unix:" + address, nil
	}
	u, err := url.Parse(address)
	if err != nil {
		return "", fmt.Errorf("the address %q is not a URI: write it as unix:///run/agent.sock or tcp://127.0.0.1:8000", address)
	}
	none := u.User == nil && u.RawQuery == "" && !u.ForceQuery && u.Fragment == "" && !strings.Contains(address, "#")
	switch {
	case u.Scheme == "unix" && u.Opaque == "" && u.Host == "" && path.IsAbs(u.Path) && none:
		return "unix:" + u.Path, nil
	case u.Scheme == "tcp" && u.Opaque == "" && u.Path == "" && none:
		if ap, err := netip.ParseAddrPort(u.Host); err == nil && ap.Port() != 0 {
			return "passthrough:///" + ap.String(), nil
		}
		return "", fmt.Errorf("the address %q does not name an IP address and a port, as tcp://127.0.0.1:8000 does", address)
	}
	return "", fmt.Errorf("the address %q is neither unix with an absolute path, as unix:///run/agent.sock, nor tcp with IP address and port, as tcp://127.0.0.1:8000", address)
}
