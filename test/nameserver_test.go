package test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"sallyport/internal/meshtest"
)

// allowedNames are rows that let payment leave the mesh.
var allowedNames = fmt.Sprintf(`p, pay-out-1, out, %[1]s, host:api.stripe.test, 443, CONNECT, -, -, allow
p, pay-out-2, out, %[1]s, host:*.wild.test, 443, CONNECT, -, -, allow
p, pay-out-3, out, %[1]s, host:real.stripe.test, 8443, CONNECT, -, -, allow
p, pay-out-4, out, %[1]s, host:shop.test, 443, GET, /v1/**, -, allow
`, id("/ns/shop/sa/payment"))

// namesWorld has payment's workload captured, as in capturedWorld, and its
// questions answered, with a gateway and a host outside.
func namesWorld(t *testing.T) *namedWorld {
	t.Helper()
	ip := meshtest.Need(t, "ip")
	if r := command(t, ip, "route", "add", "203.0.113.0/24", "dev", "lo"); r.Code != 0 { // where resolv.conf has its servers
		t.Fatal(r.Output)
	}
	w := newWorld(t, time.Minute)
	entries, err := os.ReadFile(w.path("policies", "entries.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	const of = "/join_token/payment\n    selectors: [\"child:true\"]"
	w.rewrite(w.path("policies", "entries.yaml"), strings.Replace(string(entries), of, fmt.Sprintf("/join_token/payment\n    selectors: [\"unix:uid:%d\"]", workloadUID), 1))
	if err := os.RemoveAll(w.path("policies", "tests")); err != nil { // they say that payment leaves no mesh
		t.Fatal(err)
	}
	w.extend("access.csv", allowedNames)
	site := w.startOutside("api.stripe.test")
	w.routeOut(site)
	w.extend("egress.yaml", realDestination+w.startOutside("shop.test").originated("shop.test"))
	w.startIssuer()
	gw, dot, doh := freePort(t), freePort(t), freePort(t)
	w.write("gateway", w.proxyConfig("gateway", w.token("gateway"))+fmt.Sprintf("listen: %s\nresolvers: [%q]\nnames: {dot: %q, doh: %q}\n", gw, freePort(w.t), dot, doh))
	w.awaitReady(w.start("gateway", nil, "gateway", "run", "--config", w.path("gateway", "config.yaml")))
	w.write("payment", w.proxyConfig("payment", w.token("payment"))+fmt.Sprintf(`outbound: {listen: 127.0.0.1:15001}
egress: {gateway: %s, addresses: [%q]}
names: {listen: 127.0.0.1:15053, search: [%s], gateways: [%q]}
capture:
  users: ["%d"]
  sidecar_user: "%d"
  hold: true
`, id("/ns/edge/sa/gateway"), gw, strings.Join(searchList, ", "), dot, workloadUID, os.Getuid()))
	w.startCapture()
	return &namedWorld{w, site, gw, dot, doh}
}

// realDestination is a host of which workloads are told the address.
const realDestination = `  - host: real.stripe.test
    dns: real
    private: [203.0.113.7/32]
    route: {endpoints: ["203.0.113.7:8443"]}
`

// A namedWorld is what namesWorld starts.
type namedWorld struct {
	*world
	site     *outside
	gateway  string // its address
	dot, doh string // where it answers questions
}

var searchList = []string{"ns1.svc.cluster.local", "svc.cluster.local", "cluster.local"}

// resolving runs a program as the workload, with a resolv.conf as in a cluster.
func (w *world) resolving(args ...string) runReply {
	w.t.Helper()
	conf := w.path("resolv.conf")
	w.put(conf, "nameserver 203.0.113.53\nnameserver 203.0.113.54\nsearch "+strings.Join(searchList, " ")+"\noptions ndots:5 timeout:10 attempts:2\n")
	nss := w.path("nsswitch.conf")
	w.put(nss, "hosts: files dns\n")
	for _, f := range []string{conf, nss} {
		if err := os.Chmod(f, 0o644); err != nil {
			w.t.Fatal(err)
		}
	}
	uid := strconv.Itoa(workloadUID)
	const enter = `mount --bind "$1" /etc/resolv.conf && mount --bind "$2" /etc/nsswitch.conf && u=$3 && shift 3 && exec setpriv --reuid "$u" --regid "$u" --clear-groups -- "$@"`
	return command(w.t, meshtest.Need(w.t, "unshare"), append([]string{"-m", "sh", "-c", enter, "sh", conf, nss, uid}, args...)...)
}

// questions is how many the sidecar was asked, and how many of these it took for
// made by a search suffix.
func (w *world) questions() (all, search int) {
	w.t.Helper()
	for line := range strings.Lines(w.metrics("payment")) {
		rest, ok := strings.CutPrefix(line, `sallyport_dns_questions_total{result="`)
		if !ok {
			continue
		}
		result, value, _ := strings.Cut(strings.TrimSpace(rest), `"} `)
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			w.t.Fatal(err)
		}
		if result != "mesh" { // the self-test is one
			all += int(n)
		}
		if result == "search" {
			search += int(n)
		}
	}
	return all, search
}

// TestNameserverAnswers asks with dig, whatever server it believes to ask.
func TestNameserverAnswers(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	meshtest.Need(t, "dig")
	w := namesWorld(t)
	dig := func(args ...string) string {
		t.Helper()
		return as(t, workloadUID, append([]string{"dig", "+tries=1", "+time=10", "+noall", "+comments", "+answer", "+authority"}, args...)...).Output
	}
	first := strings.Fields(dig("+short", "@203.0.113.53", "api.stripe.test"))
	if len(first) != 1 || !netip.MustParsePrefix("247.0.0.0/8").Contains(netip.MustParseAddr(first[0])) {
		t.Fatalf("an allowed name has the address %q", first)
	}
	vip := first[0]
	const refused = `EDE: 18 \(Prohibited\): \(no row lets this workload reach it\)`
	for _, tt := range []struct {
		why  string
		args []string
		want []string
	}{
		{"an allowed name", []string{"api.stripe.test"}, []string{"NOERROR", `api\.stripe\.test\.\s+30\s+IN\s+A\s+` + regexp.QuoteMeta(vip)}},
		{"over TCP", []string{"+tcp", "api.stripe.test"}, []string{"NOERROR", regexp.QuoteMeta(vip)}},
		{"a server of the world", []string{"@203.0.113.7", "api.stripe.test"}, []string{regexp.QuoteMeta(vip)}},
		{"one of this machine", []string{"@127.0.0.53", "api.stripe.test"}, []string{regexp.QuoteMeta(vip)}},
		{"in odd letters", []string{"aPI.sTripe.tESt"}, []string{`aPI\.sTripe\.tESt\.\s.*` + regexp.QuoteMeta(vip)}},
		{"HTTPS", []string{"api.stripe.test", "HTTPS"}, []string{"NOERROR", "ANSWER: 0", "SOA"}},
		{"a name below a pattern", []string{"x.wild.test"}, []string{"NOERROR", `\s247\.`}},
		{"a denied name", []string{"evil.test"}, []string{"NXDOMAIN", refused, `\.\s+5\s+IN\s+SOA`}},
		{"whatever is asked", []string{"secret.evil.test", "TXT"}, []string{"NXDOMAIN", refused}},
		{"over TCP", []string{"+tcp", "evil.test"}, []string{"NXDOMAIN", refused}},
		{"a service", []string{"billing.mesh.internal"}, []string{"NOERROR", `\s247\.`}},
		{"its port", []string{"_http._tcp.billing.mesh.internal", "SRV"}, []string{`SRV\s+0 1 8443 billing\.mesh\.internal\.`}},
		{"back again", []string{"-x", vip}, []string{`PTR\s+api\.stripe\.test\.`}},
		{"another address", []string{"-x", "203.0.113.7"}, []string{"NXDOMAIN"}},
		{"another class", []string{"version.bind", "CH", "TXT"}, []string{"REFUSED"}},
		{"another version of EDNS", []string{"+edns=1", "+noednsnegotiation", "api.stripe.test"}, []string{"BADVERS"}},
		{"a cookie", []string{"+cookie=0102030405060708", "api.stripe.test"}, []string{"NOERROR", regexp.QuoteMeta(vip)}},
		{"DNSSEC", []string{"+dnssec", "+cd", "api.stripe.test"}, []string{"NOERROR", regexp.QuoteMeta(vip)}},
	} {
		args := tt.args
		if args[0][0] != '@' {
			args = append([]string{"@203.0.113.53"}, args...)
		}
		got := dig(args...)
		for _, want := range tt.want {
			if !regexp.MustCompile(want).MatchString(got) {
				t.Errorf("%s: dig %s does not say %q:\n%s", tt.why, strings.Join(tt.args, " "), want, got)
			}
		}
	}
	w.awaitAudit("payment", "the refusal", func(r auditLine) bool {
		return r.Kind == "name" && r.Decision == "deny" && r.Dst == "host:evil.test" && r.Reason == "no_row" && r.Src == id("/ns/shop/sa/payment")
	})
	w.awaitAudit("payment", "what is answered", func(r auditLine) bool {
		return r.Kind == "name" && r.Decision == "allow" && r.Dst == "host:api.stripe.test" && r.Rule == "pay-out-1"
	})
	t.Run("nobody else asks", func(t *testing.T) {
		if r := as(t, strangerUID, "dig", "+tries=1", "+time=2", "@127.0.0.1", "-p", "15053", "api.stripe.test"); r.Code == 0 {
			t.Errorf("a stranger is answered: %s", r.Output)
		}
	})
	t.Run("a row that is gone", func(t *testing.T) {
		w.rewrite(w.path("policies", "access.csv"), "# nobody\n")
		w.await("the refusal", func() bool { return strings.Contains(dig("@203.0.113.53", "api.stripe.test"), "NXDOMAIN") })
	})
}

// TestEgressDNS has curl, which is told of no proxy and no address, reach a host
// outside by its name, and nothing else.
func TestEgressDNS(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	meshtest.Need(t, "curl")
	w := namesWorld(t)
	site := w.site
	if err := os.Chmod(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(site.ca, 0o644); err != nil {
		t.Fatal(err)
	}
	p := read(t, w.resolving(curl("--cacert", site.ca, "https://api.stripe.test/v1/charges")...))
	if p.status != "200" || !strings.Contains(p.body, `"path":"/v1/charges"`) {
		t.Fatalf("not the answer of the site: %+v", p)
	}
	w.awaitAudit("gateway", "the tunnel", func(r auditLine) bool {
		return r.Kind == "egress_open" && r.Dst == "host:api.stripe.test" && r.Src == id("/ns/shop/sa/payment") && strings.Contains(r.Detail, "origin=vip")
	})
	p = read(t, w.resolving(curl("http://shop.test/v1/charges")...)) // whose TLS the gateway speaks
	if p.status != "200" || !strings.Contains(p.body, `"path":"/v1/charges"`) {
		t.Errorf("not the answer of the other site: %+v", p)
	}
	shop := strings.Fields(w.resolving("getent", "ahostsv4", "shop.test").Output)[0]
	for reason, args := range map[string][]string{
		"no_row": {"http://shop.test/admin"}, "misdirected": {"--resolve", "api.stripe.test:80:" + shop, "http://api.stripe.test/v1/charges"},
	} {
		p := read(t, w.resolving(curl(args...)...))
		if p.status != "403" && p.status != "421" || p.decision == "" {
			t.Errorf("%s: not a proper refusal: %+v", reason, p)
		}
		w.awaitAudit("gateway", reason, func(r auditLine) bool { return r.ID == p.decision && r.Decision == "deny" && r.Reason == reason })
	}
	vip := strings.Fields(w.resolving("getent", "ahostsv4", "api.stripe.test").Output)[0]
	for name, tt := range map[string]struct {
		args            []string
		at, dst, reason string
	}{
		"another name in the hello":   {args: []string{"--resolve", "evil.test:443:" + vip, "https://evil.test/"}, at: "gateway", dst: "host:api.stripe.test", reason: "sni_mismatch"},
		"no name in the hello":        {args: []string{"https://" + vip + "/"}, at: "gateway", dst: "host:api.stripe.test", reason: "sni_missing"},
		"another port":                {args: []string{"https://api.stripe.test:8443/"}, at: "gateway", dst: "host:api.stripe.test", reason: "no_row"},
		"no TLS":                      {args: []string{"http://api.stripe.test:443/"}, at: "gateway", dst: "host:api.stripe.test", reason: "not_tls"},
		"an address of nobody":        {args: []string{"https://247.9.9.9/"}, at: "payment", dst: "host:247.9.9.9:443", reason: "no_route"},
		"an address outside":          {args: []string{"https://203.0.113.7/"}, at: "payment", dst: "host:203.0.113.7:443", reason: "no_route"},
		"a name that is not answered": {args: []string{"https://evil.test/"}, at: "payment", dst: "host:evil.test", reason: "no_row"},
	} {
		if r := w.resolving(curl(append([]string{"-k"}, tt.args...)...)...); r.Code == 0 {
			t.Errorf("%s: it is answered: %s", name, r.Output)
		}
		w.awaitAudit(tt.at, name, func(r auditLine) bool { return r.Decision == "deny" && r.Dst == tt.dst && r.Reason == tt.reason })
	}
}

// TestEgressDNSReal has a host answered with its own address, and a connection to
// that address lead to the host.
func TestEgressDNSReal(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	meshtest.Need(t, "curl")
	w := namesWorld(t)
	site := w.serveOutsideAt("203.0.113.7:8443", "real.stripe.test", http.HandlerFunc(echo))
	if err := errors.Join(os.Chmod(w.dir, 0o755), os.Chmod(site.ca, 0o644)); err != nil {
		t.Fatal(err)
	}
	if r := w.resolving(curl("-k", "https://203.0.113.7:8443/")...); r.Code == 0 {
		t.Fatalf("an address that was told for nobody is reached: %s", r.Output)
	}
	if r := w.resolving("getent", "ahostsv4", "real.stripe.test"); !strings.HasPrefix(r.Output, "203.0.113.7 ") {
		t.Fatalf("the host is at %s", r.Output)
	}
	p := read(t, w.resolving(curl("--cacert", site.ca, "https://real.stripe.test:8443/v1")...))
	if p.status != "200" || !strings.Contains(p.body, `"path":"/v1"`) {
		t.Errorf("not the answer of the site: %+v", p)
	}
	for _, args := range [][]string{{"-k", "https://203.0.113.7:8443/"}, {"-k", "--resolve", "evil.test:8443:203.0.113.7", "https://evil.test:8443/"}} {
		if r := w.resolving(curl(args...)...); r.Code == 0 {
			t.Errorf("%v: it is answered: %s", args, r.Output)
		}
	}
	for _, reason := range []string{"sni_missing", "sni_mismatch"} {
		w.awaitAudit("gateway", reason, func(r auditLine) bool {
			return r.Decision == "deny" && r.Dst == "host:real.stripe.test" && r.Reason == reason
		})
	}
}

// TestNameserverGateway asks the gateway with an SVID, as a host without a sidecar
// does, over TLS and by curl over HTTPS.
func TestNameserverGateway(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	meshtest.Need(t, "curl")
	w := namesWorld(t)
	question := func(host string) *dns.Msg {
		m := new(dns.Msg)
		m.SetQuestion(host+".", dns.TypeA)
		m.SetEdns0(1232, false)
		return m
	}
	overTLS := func(_ string, certs []tls.Certificate, host string) (*dns.Msg, error) {
		c := &dns.Client{Net: "tcp-tls", Timeout: within, TLSConfig: &tls.Config{Certificates: certs, InsecureSkipVerify: true, NextProtos: []string{"dot"}}}
		m, _, err := c.Exchange(question(host), w.dot)
		return m, err
	}
	overHTTPS := func(workload string, _ []tls.Certificate, host string) (*dns.Msg, error) {
		in, err := question(host).Pack()
		if err != nil {
			t.Fatal(err)
		}
		w.put(w.path("question"), string(in))
		line := []string{"-sSf", "-k", "--http2", "--max-time", "20", "-H", "Content-Type: application/dns-message", "--data-binary", "@" + w.path("question"), "https://" + w.doh + "/dns-query"}
		if workload != "" {
			dir := w.path("stolen-" + workload)
			line = append(line, "--cert", dir+"/svid.pem", "--key", dir+"/key.pem")
		}
		r := command(t, "curl", line...)
		if r.Code != 0 {
			return nil, errors.New(r.Output)
		}
		m := new(dns.Msg)
		return m, m.Unpack([]byte(r.Output))
	}
	certs := map[string][]tls.Certificate{"payment": {w.steal("payment").cert}, "web": {w.steal("web").cert}}
	for how, ask := range map[string]func(string, []tls.Certificate, string) (*dns.Msg, error){"TLS": overTLS, "HTTPS": overHTTPS} {
		for _, tt := range []struct{ workload, host, want string }{
			{"payment", "api.stripe.test", `status: NOERROR(.|\n)*IN\s+A\s+247\.`},
			{"payment", "real.stripe.test", `IN\s+A\s+203\.0\.113\.7`},
			{"web", "api.stripe.test", `status: NXDOMAIN(.|\n)*EDE: 18 \(Prohibited\): \(no row`},
			{"payment", "billing.mesh.internal", "status: NXDOMAIN"},
		} {
			m, err := ask(tt.workload, certs[tt.workload], tt.host)
			if err != nil || !regexp.MustCompile(tt.want).MatchString(m.String()) {
				t.Errorf("%s asks for %s over %s: want %s, got %v\n%s", tt.workload, tt.host, how, tt.want, err, m)
			}
		}
		if m, err := ask("", nil, "api.stripe.test"); err == nil {
			t.Errorf("who has no SVID is answered over %s:\n%s", how, m)
		}
	}
	w.awaitAudit("gateway", "the refusal", func(r auditLine) bool {
		return r.Kind == "name" && r.Decision == "deny" && r.Src == id("/ns/shop/sa/web") && r.Dst == "host:api.stripe.test"
	})
}

// TestNameserverIsolated has a program in a namespace of its own ask any server,
// and the sidecar see by a question of its own that it is asked there.
func TestNameserverIsolated(t *testing.T) {
	t.Parallel()
	meshtest.Need(t, "dig")
	w := newWorld(t, time.Minute)
	if err := os.RemoveAll(w.path("policies", "tests")); err != nil { // they say that payment leaves no mesh
		t.Fatal(err)
	}
	w.extend("access.csv", allowedNames)
	w.startIssuer()
	pay := &node{name: "payment"}
	w.join(pay)
	w.write(pay.name, w.sidecarConfig(pay, w.token(pay.name))+"names: {listen: 127.0.0.1:15053}\n")
	user := w.ordinary(pay.name)
	w.flags = []string{"--isolate"}
	payment := w.startWorkloadBy(pay.name, user, envListen+"="+pay.app)
	dig := func(args ...string) string {
		t.Helper()
		return ask[runReply](payment, "/run", append([]string{"dig", "+tries=1", "+time=10"}, args...)).Output
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"@203.0.113.53", "api.stripe.test"}, `IN\s+A\s+247\.`},
		{[]string{"@2001:db8::53", "api.stripe.test"}, `IN\s+A\s+247\.`},
		{[]string{"@127.0.0.53", "+tcp", "api.stripe.test"}, `IN\s+A\s+247\.`},
		{[]string{"@203.0.113.53", "billing.mesh.internal"}, `IN\s+A\s+247\.`},
		{[]string{"@203.0.113.53", "evil.test"}, `status: NXDOMAIN`},
	} {
		if got := dig(tt.args...); !regexp.MustCompile(tt.want).MatchString(got) {
			t.Errorf("dig %v: want %s, got\n%s", tt.args, tt.want, got)
		}
	}
	w.await("be ready, which the self-test must let it", func() bool { return w.readiness(pay.name) == http.StatusOK })
}

// A musl program that looks up one name as any program does.
const lookUp = `#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <arpa/inet.h>
int main(int argc, char **argv) {
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found, *a;
	char text[64];
	int err = getaddrinfo(argv[1], "443", &hints, &found);
	if (err) { printf("error %s\n", gai_strerror(err)); return 1; }
	for (a = found; a; a = a->ai_next) {
		void *from = a->ai_family == AF_INET ? (void *)&((struct sockaddr_in *)a->ai_addr)->sin_addr : (void *)&((struct sockaddr_in6 *)a->ai_addr)->sin6_addr;
		printf("%s\n", inet_ntop(a->ai_family, from, text, sizeof text));
	}
	return 0;
}
`

// roleLookUp has this program look up a name, by the resolver of Go.
const roleLookUp = "lookup"

func lookUpGo() int {
	addrs, err := net.DefaultResolver.LookupHost(context.Background(), os.Args[1])
	if err != nil {
		var d *net.DNSError
		fmt.Println(err, errors.As(err, &d) && d.IsNotFound)
		return 1
	}
	fmt.Println(strings.Join(addrs, "\n"))
	return 0
}

// TestNameserverResolvers has the resolvers that programs have look up names that
// are allowed, and names that are not, with few questions and no second round.
func TestNameserverResolvers(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	getent, muslGCC := meshtest.Need(t, "getent"), meshtest.Need(t, "musl-gcc")
	node := meshtest.Need(t, "node")
	w := namesWorld(t)
	if err := os.Chmod(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w.put(w.path("lookup.c"), lookUp)
	if r := command(t, muslGCC, "-static", "-o", w.path("lookup"), w.path("lookup.c")); r.Code != 0 {
		t.Fatal(r.Output)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(w.dir, "lookup-go")
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		args []string
		most int // questions for a name that does not exist
	}{
		"glibc":       {[]string{getent, "ahosts"}, 8},
		"musl":        {[]string{w.path("lookup")}, 16}, // it asks both servers at once
		"Go":          {[]string{"env", envRole + "=" + roleLookUp, "GODEBUG=netdns=go", program}, 8},
		"Node":        {[]string{node, "-e", `require("dns").lookup(process.argv[1],{all:true},(e,a)=>{console.log(e?e.code:a.map(x=>x.address).join("\n"));process.exit(e?1:0)})`}, 8},
		"Node c-ares": {[]string{node, "-e", `require("dns").resolve4(process.argv[1],(e,a)=>{console.log(e?e.code:a.join("\n"));process.exit(e?1:0)})`}, 4},
	} {
		t.Run(name, func(t *testing.T) {
			for _, host := range []string{"api.stripe.test", "x.wild.test", "billing.mesh.internal"} {
				r := w.resolving(append(slices.Clone(tt.args), host)...)
				if r.Code != 0 || !strings.Contains(r.Output, "247.") {
					t.Errorf("%s: %d %s", host, r.Code, r.Output)
				}
			}
			for _, host := range []string{"evil.test", "a.b.c.d.e.evil.test", "intranet", "api.stripe.test.evil"} {
				before, _ := w.questions()
				r := w.resolving(append(slices.Clone(tt.args), host)...)
				after, _ := w.questions()
				if n := after - before; r.Code == 0 || n == 0 || n > tt.most || strings.Contains(r.Output, "AGAIN") || strings.Contains(r.Output, "emporary") {
					t.Errorf("%s: %d after %d questions: %s", host, r.Code, n, r.Output)
				} else {
					t.Logf("%s: %s: %d questions", name, host, n)
				}
			}
		})
	}
	if _, search := w.questions(); search == 0 {
		t.Error("no name was taken for made by a search suffix")
	}
}
