package test

import (
	"encoding/json"
	"io"
	"net/http"
	"regexp"
	"strings"
)

// looksAtThePage opens the page by the link that a demo printed, and waits until
// it shows what the mesh does.
func (p *proc) looksAtThePage() {
	p.t.Helper()
	m := regexp.MustCompile(`(http://127\.0\.0\.1:[0-9]+)/denied#([A-Z0-9]+)`).FindStringSubmatch(p.out.String())
	if m == nil {
		p.t.Fatalf("the demo printed no link to its page:\n%s", p.out)
	}
	ask := func(method, path, session, body string) (int, string) {
		req, err := http.NewRequestWithContext(p.t.Context(), method, m[1]+path, strings.NewReader(body))
		if err != nil {
			p.t.Fatal(err)
		}
		req.Header.Set("Origin", m[1])
		req.Header.Set("Authorization", "Bearer "+session)
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return 0, err.Error()
		}
		return resp.StatusCode, string(b)
	}
	var in struct{ Session string }
	code, body := ask("POST", "/session", "", `{"token":"`+m[2]+`"}`)
	if err := json.Unmarshal([]byte(body), &in); code != 200 || err != nil {
		p.t.Fatalf("the link does not open the page: %d %s", code, body)
	}
	if code, _ := ask("POST", "/session", "", `{"token":"`+m[2]+`"}`); code != 403 {
		p.t.Errorf("the link opens the page twice: %d", code)
	}
	for path, want := range map[string]string{
		"/map": "api.stripe.test", "/map?focus=shop/payment": "shop/</span>billing", "/denied": "access.csv", "/egress": "evil.test",
		"/services": "SYNCED", "/audit?kind=admin": "page.Enter", "/ca": "signs",
	} {
		p.await("show "+want+" at "+path, func() bool {
			code, body := ask("GET", "/view"+path, in.Session, "")
			return code == 200 && strings.Contains(body, want)
		})
	}
}
