package gatewayapi

import (
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

const documents = `apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: shop
spec:
  parentRefs:
    - {group: "", kind: Service, name: billing}
  rules:
    - matches:
        - path: {type: Exact, value: /v1/charges}
          method: POST
          headers:
            - {name: X-Canary, value: "1"}
            - {name: X-Canary, value: "2"}
          queryParams: [{type: RegularExpression, name: q, value: "a|b"}]
      backendRefs:
        - {name: billing, port: 80, weight: 0}
        - {name: ledger, port: 80}
      timeouts: {request: 5s, backendRequest: 1s}
      retry: {codes: [503], attempts: 2, backoff: 100ms}
      filters:
        - type: RequestHeaderModifier
          requestHeaderModifier: {set: [{name: X-A, value: b}], remove: [X-C]}
        - type: URLRewrite
          urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: /v2/charges}}
        - type: RequestMirror
          requestMirror: {backendRef: {name: shadow}, percent: 5}
    - name: old
      matches: [{path: {value: /old}}]
      filters:
        - type: RequestRedirect
          requestRedirect: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}, statusCode: 301}
---
apiVersion: gateway.networking.k8s.io/v1
kind: GRPCRoute
metadata: {name: rpc}
spec:
  hostnames: [billing.mesh.internal]
  rules:
    - matches: [{method: {service: shop.v1.Billing, method: Charge}}]
      backendRefs: [{name: ledger}]
---
apiVersion: gateway.networking.k8s.io/v1alpha2
kind: TCPRoute
metadata: {name: db}
spec:
  parentRefs: [{kind: Service, name: db}]
  rules:
    - backendRefs: [{name: db, weight: 9}, {name: db-2, weight: 1}]
`

func TestImportedRoutesAreGoodAndReadBack(t *testing.T) {
	got, err := Import("k8s.yaml", []byte(documents), "")
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got[0].Service != "db" || got[1].Service != "billing" || len(got[1].Routes) != 3 {
		t.Fatalf("got %+v", got)
	}
	folder := fstest.MapFS{"access.csv": {}, "services.yaml": {Data: []byte(`services:
  - {name: billing, identity: "spiffe://demo.sallyport/a", port: 80}
  - {name: ledger, identity: "spiffe://demo.sallyport/b", port: 80}
  - {name: shadow, identity: "spiffe://demo.sallyport/c", port: 80}
  - {name: db, identity: "spiffe://demo.sallyport/d", port: 80, protocol: tcp}
  - {name: db-2, identity: "spiffe://demo.sallyport/e", port: 80, protocol: tcp}
`)}}
	for i := range got {
		folder["routes/"+string(got[i].Service)+".yaml"] = &fstest.MapFile{Data: got[i].EncodeYAML()}
	}
	p, err := mesh.ParseFS(folder, spiffeid.RequireTrustDomainFromString("demo.sallyport"))
	if err != nil {
		t.Fatalf("%v\n%s", err, got[1].EncodeYAML())
	}
	for i := range p.Routes {
		for j := range p.Routes[i].Routes {
			p.Routes[i].Routes[j].Origin = mesh.Origin{}
		}
		p.Routes[i].Origin = mesh.Origin{}
	}
	if diff := cmp.Diff([]mesh.Routes{got[1], got[0]}, p.Routes); diff != "" {
		t.Errorf("(-imported +read back):\n%s", diff)
	}
	r := p.Routes[0].Routes
	if r[0].Name != "rpc-1" || r[1].Name != "shop-1" || r[1].Backends[0] != (mesh.Backend{}) || r[1].Backends[1].Weight != 1 || r[1].Shadows[0].Share != 500 || len(r[1].Matches[0].Headers) != 1 {
		t.Errorf("got %+v", r)
	}
}

func TestImportRefusesWhatItDoesNotUnderstand(t *testing.T) {
	for _, tt := range []struct{ old, new, want string }{
		{"kind: HTTPRoute", "kind: UDPRoute", "none of HTTPRoute"},
		{"gateway.networking.k8s.io/v1\nkind: HTTP", "example.com/v1\nkind: HTTP", "is not of gateway.networking"},
		{"type: RequestMirror\n", "type: ExtensionRef\n", `filter of type "ExtensionRef"`},
		{"method: POST", "mehtod: POST", `unknown field "mehtod"`},
		{"{type: Exact, value: /v1", "{type: Suffix, value: /v1", "type Suffix is not supported"},
		{"kind: Service, name: billing", "kind: Gateway, name: edge", "name the service"},
		{"hostnames: [billing.mesh.internal]", "hostnames: [billing.mesh.internal, ledger.mesh.internal]", "several services"},
		{"{name: ledger, port: 80}", "{name: ledger, kind: Bucket}", "only a Service"},
		{"parentRefs: [{kind: Service, name: db}]", "parentRefs: [{kind: Service, name: db}]\n  hostnames: [db.example]", "streams are carried unread"},
		{"percent: 5", "percent: 500", "not from 0 to 100"},
	} {
		text := strings.Replace(documents, tt.old, tt.new, 1)
		if text == documents {
			t.Fatalf("%q is not in the documents", tt.old)
		}
		if _, err := Import("k8s.yaml", []byte(text), ""); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %s", tt.new, err, tt.want)
		}
	}
}

func TestWhatRulesLeaveOut(t *testing.T) {
	const rules = `apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: edge}
spec:
  parentRefs: [{name: gw}]
  hostnames: [billing.mesh.internal, shop.example, "*.shop.example"]
  rules:
    - backendRefs: [{name: ledger}]
    - matches: [{path: {value: /v1/}, headers: [{name: X-A, value: "1"}, {name: x-a, value: "2"}], queryParams: [{name: q, value: "1"}, {name: Q, value: "2"}]}]
    - matches: [{path: {value: /}}]
      filters: [{type: RequestRedirect, requestRedirect: {statusCode: 303}}]
`
	got, err := Import("k8s.yaml", []byte(rules), "")
	if err != nil || len(got) != 1 || got[0].Service != "billing" {
		t.Fatalf("%+v %v", got, err)
	}
	host := func(text string) mesh.NamedText {
		return mesh.NamedText{Name: "Host", Text: mesh.Text{Regex: "(?i)" + text + "(:[0-9]+)?"}}
	}
	bill, shop, below := host(`billing\.mesh\.internal`), host(`shop\.example`), host(`.+\.shop\.example`)
	v1, all := &mesh.Text{Prefix: "/v1"}, &mesh.Text{Prefix: "/"}
	a, q := mesh.NamedText{Name: "X-A", Text: mesh.Text{Exact: "1"}}, []mesh.NamedText{{Name: "q", Text: mesh.Text{Exact: "1"}}, {Name: "Q", Text: mesh.Text{Exact: "2"}}}
	want := []mesh.Route{
		{Name: "edge-1", Matches: []mesh.Match{{Headers: []mesh.NamedText{bill}}, {Headers: []mesh.NamedText{shop}}, {Headers: []mesh.NamedText{below}}}, Backends: []mesh.Backend{{Service: "ledger", Weight: 1}}},
		{Name: "edge-2", Matches: []mesh.Match{{Path: v1, Headers: []mesh.NamedText{bill, a}, Query: q}, {Path: v1, Headers: []mesh.NamedText{shop, a}, Query: q}, {Path: v1, Headers: []mesh.NamedText{below, a}, Query: q}}, Respond: &mesh.Respond{Status: 500}},
		{Name: "edge-3", Matches: []mesh.Match{{Path: all, Headers: []mesh.NamedText{bill}}, {Path: all, Headers: []mesh.NamedText{shop}}, {Path: all, Headers: []mesh.NamedText{below}}}, Redirect: &mesh.Redirect{Scheme: "http", Status: 303}},
	}
	if diff := cmp.Diff(want, got[0].Routes); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestMistakesHaveTheirLine(t *testing.T) {
	text := strings.Replace(documents, "kind: TCPRoute", "kind: TCPRoute\nstatus: {}", 1)
	_, err := Import("k8s.yaml", []byte(text), "")
	if err == nil || !strings.Contains(err.Error(), "k8s.yaml:45:") {
		t.Errorf("%v", err)
	}
}

func FuzzImport(f *testing.F) {
	f.Add([]byte(documents))
	f.Add([]byte("---\n---\nkind: HTTPRoute\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := Import("x", b, "billing")
		if err != nil {
			return
		}
		for i := range got {
			var back mesh.Routes
			if text := got[i].EncodeYAML(); mesh.DecodeYAML("x.yaml", text, &back) != nil {
				t.Errorf("what was imported cannot be read:\n%s\n%s", text, b)
			} else if diff := cmp.Diff(got[i], back, cmpopts.EquateEmpty(), cmpopts.IgnoreTypes(mesh.Origin{})); diff != "" {
				t.Errorf("read otherwise than it was imported: %s\n%s", diff, b)
			}
		}
	})
}
