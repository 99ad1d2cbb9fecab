package gwconformance

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	gw "sigs.k8s.io/gateway-api/apis/v1"
)

// object is a part of a document.
type object = map[string]any

// use writes the routes of a test into the policy as routes of the service that
// plays the Gateway, and waits until every proxy acts on them. What none matches
// is not found, which is what a Gateway answers.
func (w *world) use(t *testing.T, k *cluster) {
	t.Helper()
	var routes []object
	for _, r := range k.http {
		for i := range r.Spec.Rules {
			routes = append(routes, ofHTTP(r.Spec.Hostnames, &r.Spec.Rules[i]))
		}
	}
	for _, r := range k.grpc {
		for i := range r.Spec.Rules {
			routes = append(routes, ofGRPC(r.Spec.Hostnames, &r.Spec.Rules[i]))
		}
	}
	for i, r := range routes {
		r["name"] = fmt.Sprintf("rule-%d", i)
	}
	w.revision++
	routes = append(routes, object{"name": "none", "respond": object{"status": 404}},
		object{"name": "revision", "matches": []object{{"path": object{"exact": revisionPath}}}, "respond": object{"status": 200, "body": strconv.Itoa(w.revision)}})
	b, err := json.Marshal(object{"service": gateway, "routes": routes})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.path("policies", "routes", "gateway.yaml"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	w.inForce(t)
}

// inForce waits until the Gateway's sidecar answers by the newest routes.
func (w *world) inForce(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(bound); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get("http://" + gatewayIP + revisionPath)
		if err != nil {
			continue
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err == nil && string(b) == strconv.Itoa(w.revision) {
			return
		}
	}
	out, err := w.sallyport("policy", "status")
	t.Fatalf("the routes did not come into force: %v\n%s", err, out)
}

// revisionPath is where the Gateway says which routes are in force.
const revisionPath = "/-/revision"

func ofHTTP(hosts []gw.Hostname, r *gw.HTTPRouteRule) object {
	out := object{}
	var matches []object
	for _, m := range r.Matches {
		o := object{}
		if m.Path != nil {
			o["path"] = pathOf(m.Path)
		}
		if m.Method != nil {
			o["method"] = *m.Method
		}
		var headers, query []object
		for _, h := range m.Headers {
			headers = append(headers, named(string(h.Name), h.Value, h.Type != nil && *h.Type == gw.HeaderMatchRegularExpression))
		}
		for _, q := range m.QueryParams {
			query = append(query, named(string(q.Name), q.Value, q.Type != nil && *q.Type == gw.QueryParamMatchRegularExpression))
		}
		matches = append(matches, spread(hosts, o, headers, query)...)
	}
	if len(r.Matches) == 0 {
		matches = spread(hosts, object{"path": object{"prefix": "/"}}, nil, nil)
	}
	out["matches"] = matches
	var refs []gw.BackendRef
	for _, b := range r.BackendRefs {
		refs = append(refs, b.BackendRef)
	}
	if b := backendsOf(refs); b != nil {
		out["backends"] = b
	}
	for i := range r.Filters {
		filter(out, &r.Filters[i])
	}
	if t := r.Timeouts; t != nil {
		limits := object{}
		for name, d := range map[string]*gw.Duration{"request": t.Request, "backend_request": t.BackendRequest} {
			if d == nil {
				continue
			}
			if v, err := time.ParseDuration(string(*d)); err == nil && v > 0 {
				limits[name] = v.String()
			}
		}
		if len(limits) > 0 {
			out["timeouts"] = limits
		}
	}
	return out
}

func ofGRPC(hosts []gw.Hostname, r *gw.GRPCRouteRule) object {
	var matches []object
	for _, m := range r.Matches {
		o := object{}
		if m.Method != nil {
			method := object{}
			if m.Method.Service != nil {
				method["service"] = *m.Method.Service
			}
			if m.Method.Method != nil {
				method["method"] = *m.Method.Method
			}
			o["grpc"] = method
		}
		var headers []object
		for _, h := range m.Headers {
			headers = append(headers, named(string(h.Name), h.Value, h.Type != nil && *h.Type == gw.GRPCHeaderMatchRegularExpression))
		}
		matches = append(matches, spread(hosts, o, headers, nil)...)
	}
	if len(r.Matches) == 0 {
		matches = spread(hosts, object{"path": object{"prefix": "/"}}, nil, nil)
	}
	var refs []gw.BackendRef
	for _, b := range r.BackendRefs {
		refs = append(refs, b.BackendRef)
	}
	return object{"matches": matches, "backends": backendsOf(refs)}
}

// spread makes a match for each host, of which one must be asked for.
func spread(hosts []gw.Hostname, o object, headers, query []object) (out []object) {
	if len(query) > 0 {
		o["query"] = query
	}
	if len(hosts) == 0 {
		if len(headers) > 0 {
			o["headers"] = headers
		}
		return []object{o}
	}
	for _, h := range hosts {
		one := object{}
		for k, v := range o {
			one[k] = v
		}
		host := object{"name": "host", "exact": string(h)}
		if rest, wild := strings.CutPrefix(string(h), "*"); wild {
			host = object{"name": "host", "suffix": rest}
		}
		one["headers"] = append([]object{host}, headers...)
		out = append(out, one)
	}
	return out
}

func named(name, value string, regex bool) object {
	if regex {
		return object{"name": name, "regex": value}
	}
	return object{"name": name, "exact": value}
}

func pathOf(p *gw.HTTPPathMatch) object {
	v := "/"
	if p.Value != nil {
		v = *p.Value
	}
	switch {
	case p.Type != nil && *p.Type == gw.PathMatchExact:
		return object{"exact": v}
	case p.Type != nil && *p.Type == gw.PathMatchRegularExpression:
		return object{"regex": v}
	case len(v) > 1:
		v = strings.TrimSuffix(v, "/")
	}
	return object{"prefix": v}
}

func backendsOf(refs []gw.BackendRef) (out []object) {
	for _, b := range refs {
		weight := int32(1)
		if b.Weight != nil {
			weight = *b.Weight
		}
		out = append(out, object{"service": string(b.Name), "weight": weight})
	}
	return out
}

func filter(out object, f *gw.HTTPRouteFilter) {
	rewrite := func() object {
		if out["rewrite"] == nil {
			out["rewrite"] = object{}
		}
		return out["rewrite"].(object)
	}
	switch f.Type {
	case gw.HTTPRouteFilterRequestHeaderModifier:
		rewrite()["headers"] = editOf(f.RequestHeaderModifier)
	case gw.HTTPRouteFilterResponseHeaderModifier:
		out["answer"] = editOf(f.ResponseHeaderModifier)
	case gw.HTTPRouteFilterURLRewrite:
		replace(rewrite(), f.URLRewrite.Path)
	case gw.HTTPRouteFilterRequestRedirect:
		r := f.RequestRedirect
		to := object{"status": 302}
		if r.StatusCode != nil {
			to["status"] = *r.StatusCode
		}
		if r.Scheme != nil {
			to["scheme"] = *r.Scheme
		}
		if r.Hostname != nil {
			to["host"] = string(*r.Hostname)
		}
		if r.Port != nil {
			to["port"] = *r.Port
		}
		if replace(to, r.Path); len(to) == 1 {
			to["scheme"] = "http" // that of the listener
		}
		out["redirect"] = to
	case gw.HTTPRouteFilterCORS:
		c := f.CORS
		cors := object{"allow_origins": c.AllowOrigins, "allow_methods": c.AllowMethods, "allow_headers": c.AllowHeaders, "expose_headers": c.ExposeHeaders}
		if c.AllowCredentials != nil {
			cors["allow_credentials"] = *c.AllowCredentials
		}
		if c.MaxAge > 0 {
			cors["max_age"] = (time.Duration(c.MaxAge) * time.Second).String()
		}
		for k, v := range cors {
			if b, err := json.Marshal(v); err == nil && string(b) == "null" {
				delete(cors, k)
			}
		}
		out["cors"] = cors
	}
}

func replace(to object, p *gw.HTTPPathModifier) {
	switch {
	case p == nil:
	case p.ReplaceFullPath != nil:
		to["path"] = *p.ReplaceFullPath
	case p.ReplacePrefixMatch != nil:
		to["prefix"] = *p.ReplacePrefixMatch
	}
}

func editOf(f *gw.HTTPHeaderFilter) object {
	out := object{}
	for name, list := range map[string][]gw.HTTPHeader{"set": f.Set, "add": f.Add} {
		fields := object{}
		for _, h := range list {
			fields[string(h.Name)] = h.Value
		}
		if len(fields) > 0 {
			out[name] = fields
		}
	}
	if len(f.Remove) > 0 {
		out["remove"] = f.Remove
	}
	return out
}
