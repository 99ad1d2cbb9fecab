package authz

import (
	"bytes"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/mesh"
)

const adminRows = `# who may do what
p, shop-desk, spiffe://corp.example/ns/ops/sa/desk, entry.*, spiffe://corp.example/ns/shop/**, allow
p, no-billing, spiffe://corp.example/**, *, spiffe://corp.example/ns/shop/sa/billing, deny
p, no-mint, local, svid.MintX509SVID, **, deny
p, pusher, spiffe://corp.example/ns/ci/**, mesh.*, **, allow
p, tapper, spiffe://corp.example/ns/ops/sa/tap, mesh.Tap, spiffe://corp.example/ns/shop/**, allow
p, count, spiffe://corp.example/ns/ops/*/desk, agent.CountAgents, **, allow
`

var adminDomain = spiffeid.RequireTrustDomainFromString("corp.example")

// named is an identity of adminDomain, zero for an empty path.
func named(path string) spiffeid.ID {
	if path == "" {
		return spiffeid.ID{}
	}
	return spiffeid.RequireFromPath(adminDomain, path)
}

func admins(p *mesh.Policies) *Admins {
	return NewAdmins(func() *mesh.Policies { return p }, slog.New(slog.DiscardHandler))
}

func TestAdminRowsDecideByDenyOverrides(t *testing.T) {
	p, err := mesh.ParseFS(fstest.MapFS{"access.csv": {Data: []byte{}}, "admin.csv": {Data: []byte(adminRows)}}, adminDomain)
	if err != nil {
		t.Fatal(err)
	}
	a := admins(p)
	const desk = "/ns/ops/sa/desk"
	for _, tc := range []struct {
		caller, method, on string
		effect             mesh.Effect
		rule               string
	}{
		{desk, "entry.BatchCreateEntry", "/ns/shop/sa/pay", mesh.Allow, "shop-desk"},
		{desk, "entry.BatchCreateEntry", "/ns/shop/sa/billing", mesh.Deny, "no-billing"},
		{desk, "entry.BatchCreateEntry", "/ns/ops/sa/pay", "", ""},
		{desk, "entry.BatchCreateEntry", "", "", ""},
		{desk, "agent.CountAgents", "", mesh.Allow, "count"},
		{desk, "agent.BanAgent", "/ns/shop/sa/pay", "", ""},
		{"/ns/ops/sa/other", "entry.ListEntries", "/ns/shop/sa/pay", "", ""},
		{"/ns/ci/sa/push", "mesh.PushPolicy", "", mesh.Allow, "pusher"},
		{"/ns/ci/sa/push", "mesh.Tap", "/ns/shop/sa/pay", "", ""}, // no pattern gives it
		{"/ns/ops/sa/tap", "mesh.Tap", "/ns/shop/sa/pay", mesh.Allow, "tapper"},
		{"/ns/ops/sa/tap", "mesh.Tap", "/ns/shop/sa/billing", mesh.Deny, "no-billing"}, // one takes it
		{"", "svid.MintX509SVID", "/ns/shop/sa/pay", mesh.Deny, "no-mint"},
		{"", "svid.MintJWTSVID", "/ns/shop/sa/billing", "", ""},
	} {
		effect, rule := a.JudgeAdmin(named(tc.caller), tc.method, named(tc.on))
		if effect != tc.effect || rule != tc.rule {
			t.Errorf("%s %s on %s: %q by %q, want %q by %q", tc.caller, tc.method, tc.on, effect, rule, tc.effect, tc.rule)
		}
	}
	if a.MayAdmin(named("/ns/ci/sa/push"), "mesh.Tap") || !a.MayAdmin(named("/ns/ops/sa/tap"), "mesh.Tap") {
		t.Error("MayAdmin gives mesh.Tap by a pattern, or not by name")
	}
	if !a.MayAdmin(named(desk), "entry.GetEntry") || a.MayAdmin(named(desk), "svid.MintX509SVID") || a.MayAdmin(named("/x"), "entry.GetEntry") || a.MayAdmin(named(""), "entry.GetEntry") {
		t.Error("MayAdmin does not follow the allow rows")
	}
}

// TestAdminsFollowThePolicies: there is nothing to judge by before the first, and
// the next set counts from the next call on.
func TestAdminsFollowThePolicies(t *testing.T) {
	var p *mesh.Policies
	a := NewAdmins(func() *mesh.Policies { return p }, slog.New(slog.DiscardHandler))
	judge := func() mesh.Effect { e, _ := a.JudgeAdmin(named("/desk"), "entry.GetEntry", named("/x")); return e }
	if e := judge(); e != "" || a.MayAdmin(named("/desk"), "entry.GetEntry") {
		t.Errorf("without policies %q", e)
	}
	for _, effect := range []mesh.Effect{mesh.Allow, mesh.Deny} {
		p = &mesh.Policies{TrustDomain: adminDomain, Admin: []mesh.AdminRule{{ID: "r", Caller: named("/desk").String(), Method: "*", On: mesh.Any, Effect: effect}}}
		if e := judge(); e != effect || a.MayAdmin(named("/desk"), "entry.GetEntry") != (effect == mesh.Allow) {
			t.Errorf("%q, want %q", e, effect)
		}
	}
}

// TestWhatCasbinCannotJudgeIsDenied, to everybody, and the log says which row.
func TestWhatCasbinCannotJudgeIsDenied(t *testing.T) {
	row := mesh.AdminRule{ID: "r", Caller: named("/desk").String(), Method: "*", On: mesh.Any, Effect: mesh.Allow, Origin: mesh.Origin{File: "admin.csv", Line: 7}}
	twice, effect := row, row
	effect.Effect = "Allow"
	for name, rows := range map[string][]mesh.AdminRule{"a double": {row, twice}, "no effect": {effect}} {
		var log bytes.Buffer
		a := NewAdmins(func() *mesh.Policies { return &mesh.Policies{Admin: rows} }, slog.New(slog.NewTextHandler(&log, nil)))
		if e, _ := a.JudgeAdmin(named("/desk"), "entry.GetEntry", named("/x")); e != mesh.Deny || a.MayAdmin(named("/desk"), "entry.GetEntry") {
			t.Errorf("%s: %q, want deny", name, e)
		}
		if e, _ := a.JudgeAdmin(named(""), "entry.GetEntry", named("/x")); e != mesh.Deny {
			t.Errorf("%s, local: %q, want deny", name, e)
		}
		if !strings.Contains(log.String(), "admin.csv:7") {
			t.Errorf("%s: the log does not name the row: %s", name, log.String())
		}
	}
	broken := &adminSet{}
	if _, _, err := broken.ask(nil, named("/desk"), "entry.GetEntry", ""); err == nil {
		t.Error("a panic is no error")
	}
}

// FuzzAdmins compares Casbin with the plain definition of the rows.
func FuzzAdmins(f *testing.F) {
	f.Add(adminRows, "/ns/ops/sa/desk", "entry.GetEntry", "/ns/shop/sa/billing")
	f.Add(adminRows, "", "svid.MintX509SVID", "")
	f.Add("p, a, **, *, **, deny\np, b, local, agent.*, **, allow\n", "/x", "agent.BanAgent", "/spire/agent/x/y")
	f.Fuzz(func(t *testing.T, rows, caller, method, on string) {
		p, err := mesh.ParseFS(fstest.MapFS{"access.csv": {Data: []byte{}}, "admin.csv": {Data: []byte(rows)}}, adminDomain)
		if err != nil {
			return
		}
		var who, what spiffeid.ID
		if caller != "" {
			if who, err = spiffeid.FromPath(adminDomain, caller); err != nil {
				return
			}
		}
		if on != "" {
			if what, err = spiffeid.FromPath(adminDomain, on); err != nil {
				return
			}
		}
		var allows, denies []string
		may := false
		for _, r := range p.Admin {
			service, _, _ := strings.Cut(method, ".")
			if who.IsZero() != (r.Caller == mesh.AdminLocal) || !who.IsZero() && !mesh.MatchSrc(r.Caller, who.String()) || method == "" ||
				r.Method != "*" && r.Method != method && r.Method != service+".*" || method == "mesh.Tap" && r.Effect == mesh.Allow && r.Method != method {
				continue
			}
			may = may || r.Effect == mesh.Allow
			switch {
			case r.On != mesh.Any && (what.IsZero() || !mesh.MatchSrc(r.On, what.String())):
			case r.Effect == mesh.Allow:
				allows = append(allows, r.ID)
			default:
				denies = append(denies, r.ID)
			}
		}
		a := admins(p)
		effect, rule := a.JudgeAdmin(who, method, what)
		switch {
		case len(denies) > 0 && effect == mesh.Deny && slices.Contains(denies, rule):
		case len(denies) == 0 && len(allows) > 0 && effect == mesh.Allow && slices.Contains(allows, rule):
		case len(denies) == 0 && len(allows) == 0 && effect == "" && rule == "":
		default:
			t.Fatalf("%q by %q, want one of denies %q, else of allows %q", effect, rule, denies, allows)
		}
		if got := a.MayAdmin(who, method); got != may {
			t.Fatalf("MayAdmin = %t, want %t", got, may)
		}
	})
}
