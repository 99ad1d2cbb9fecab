package proxy

import (
	"bytes"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"

	"sallyport/internal/audit"
	"sallyport/internal/authz"
	"sallyport/internal/http1"
	"sallyport/internal/mesh"
)

// credential checks what the call shows of its caller beside the certificate,
// and takes from it whatever could pass for what we say of the caller.
func (in *Inbound) credential(x *call) *refusal {
	x.token = nil
	v := in.cfg.Tokens
	if v == nil || !v.Active() {
		return nil
	}
	host := ""
	if in.cfg.Name != nil {
		if name := in.cfg.Name(); name != "" {
			host = x.host.textOf(name)
		}
	}
	x.show(host, v.APIKeyHeader())
	x.shown.Thumbprint = x.who.thumbprint
	t, f := v.Check(x.ctx, &x.shown)
	if f != nil {
		return in.refuseCredential(x, f)
	}
	x.token = t
	sets := in.drops.of(x.shown.Drop)
	x.ex.ToUp.Drop = sets.pick(x.ex.ToUp.Drop == droppedWithState, t != nil && t.Ours())
	if t != nil {
		x.extra = append(x.extra, t.Fields()...)
	}
	return nil
}

// show collects the credentials of a request to host.
func (x *call) show(host, keyField string) {
	path := x.req.PathText()
	if len(path) != len(x.req.Path) {
		path = string(x.req.Path) // with parameters: a proof is for one target
	}
	x.shown = authz.Credential{Method: x.req.Verb(), Path: path, Host: host, InQuery: tokenInQuery(x.req.RawQuery)}
	take := func(into *[]byte, value []byte) {
		x.shown.Doubled = x.shown.Doubled || *into != nil
		if *into = value; value == nil {
			*into = []byte{}
		}
	}
	for i := range x.req.Fields {
		switch f := &x.req.Fields[i]; {
		case is(f.Name, "authorization"):
			take(&x.shown.Authorization, f.Value)
		case is(f.Name, "dpop"):
			take(&x.shown.Proof, f.Value)
		case keyField != "" && is(f.Name, keyField):
			take(&x.shown.APIKey, f.Value)
		}
	}
}

// is compares a field name with a lower-case one.
func is(name []byte, want string) bool {
	return len(name) == len(want) && strings.EqualFold(string(name), want)
}

// tokenInQuery finds a token where it would end up in logs (RFC 6750 section
// 2.3, which nobody should use).
func tokenInQuery(query []byte) bool {
	for len(query) > 0 {
		var one []byte
		if i := bytes.IndexAny(query, "&;"); i >= 0 {
			one, query = query[:i], query[i+1:]
		} else {
			one, query = query, nil
		}
		name, _, _ := bytes.Cut(one, []byte("="))
		if bytes.ContainsAny(name, "%+") {
			s, err := url.QueryUnescape(string(name))
			if err != nil {
				continue
			}
			name = []byte(s)
		}
		if string(name) == "access_token" {
			return true
		}
	}
	return false
}

// What a refused client is told. It does not say what was wrong with a token:
// who made it up would learn how to make a better one.
var credentialTexts = map[int]string{
	400: "show one credential, in the field for it",
	401: "the credential does not count here",
	429: "too many calls with this credential",
	503: "the credential cannot be checked now",
}

func (in *Inbound) refuseCredential(x *call, f *authz.Fault) *refusal {
	r := in.deny(audit.Record{
		Reason: string(f.Code), Dir: string(mesh.In), Src: x.src, Dst: x.dst, Port: in.cfg.Port(),
		Verb: x.verb(), Path: x.path(), Peer: x.remote, Trace: x.traceText(), Detail: f.Detail,
	})
	if r.decision == "" {
		return r
	}
	return &refusal{
		status: f.Status(), reason: "credential", decision: r.decision,
		told: credentialTexts[f.Status()], head: in.cfg.Tokens.Challenge(f, in.realm(x)),
	}
}

// realm names the service to a client that must choose a credential.
func (in *Inbound) realm(x *call) string {
	if x.shown.Host != "" {
		return x.shown.Host
	}
	return in.self
}

// lacking answers a call that only a condition on tokens kept from being
// allowed: 401 when it showed none, 403 when what it showed is not enough.
func (in *Inbound) lacking(x *call, decision string) *refusal {
	r := &refusal{status: 403, reason: "policy", decision: decision}
	switch v := in.cfg.Tokens; {
	case v == nil || !v.Active():
	case x.token == nil:
		r.status, r.told, r.head = 401, "a credential is needed", v.Missing(in.realm(x))
	default:
		r.told, r.head = "the credential does not allow this", v.Insufficient(in.realm(x))
	}
	return r
}

// dropSets are the fields that do not reach the application, beside those that
// only a proxy may set.
type dropSets struct {
	cur atomic.Pointer[fourSets]
}

// fourSets are for one list of names: with and without tracestate, with and
// without Authorization.
type fourSets struct {
	names []string
	set   [4]*http1.NameSet
}

// of gives the sets for the names, made anew when the policy has changed.
func (d *dropSets) of(names []string) *fourSets {
	s := d.cur.Load()
	if s != nil && slices.Equal(s.names, names) {
		return s
	}
	s = &fourSets{names: names}
	for i := range s.set {
		list := slices.Concat(reserved, names)
		if i&1 != 0 {
			list = append(list, "tracestate")
		}
		if i&2 != 0 {
			list = append(list, "authorization")
		}
		s.set[i] = http1.NewNameSet(list...)
	}
	d.cur.Store(s)
	return s
}

func (s *fourSets) pick(tracestate, authorization bool) *http1.NameSet {
	i := 0
	if tracestate {
		i |= 1
	}
	if authorization {
		i |= 2
	}
	return s.set[i]
}
