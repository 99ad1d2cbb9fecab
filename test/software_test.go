package test

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"

	"sallyport/internal/meshtest"
	"sallyport/internal/store/postgrestest"
)

const (
	softwareHost = "api.acme.test"
	clearHost    = "clear.acme.test" // whose TLS the gateway speaks
	databaseHost = "db.acme.test"
)

// softwareRows let payment reach what the programs below ask for.
var softwareRows = fmt.Sprintf(`p, soft-1, out, %[1]s, host:%[2]s, 443, CONNECT, -, -, allow
p, soft-2, out, %[1]s, host:%[3]s, 5432, CONNECT, -, -, allow
p, soft-3, out, %[1]s, host:%[4]s, 443, GET|POST, /**, -, allow
`, id("/ns/shop/sa/payment"), softwareHost, databaseHost, clearHost)

// A siteOutside is a host with all that the programs ask for: a page, a
// repository of git, of Debian packages, of Python and of Node ones, a proxy of Go
// modules, and gRPC.
type siteOutside struct{ addr, ca, clearCA, dir, pin string }

func (w *world) startSite() *siteOutside {
	w.t.Helper()
	s := &siteOutside{ca: w.path("site.pem"), clearCA: w.path("clear.pem"), dir: w.path("site")}
	cert := w.certify(softwareHost, s.ca)
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		w.t.Fatal(err)
	}
	pin := sha256.Sum256(leaf.RawSubjectPublicKeyInfo)
	s.pin = base64.StdEncoding.EncodeToString(pin[:])
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		w.t.Fatal(err)
	}
	s.git(w)
	s.debian(w)
	s.module(w)
	s.wheel(w)
	s.tarball(w)
	calls := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(calls, health.NewServer())
	files := http.FileServer(http.Dir(s.dir))
	mux := http.NewServeMux()
	mux.Handle("/", files)
	mux.HandleFunc("/v1", func(rw http.ResponseWriter, r *http.Request) { fmt.Fprintf(rw, "the page of %s\n", r.Host) })
	h := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			calls.ServeHTTP(rw, r)
			return
		}
		mux.ServeHTTP(rw, r)
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	s.addr = ln.Addr().String()
	srv := &http.Server{Handler: h, TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert, w.certify(clearHost, s.clearCA)}}}
	go func() { _ = srv.ServeTLS(ln, "", "") }()
	w.t.Cleanup(func() { srv.Close() })
	return s
}

// git makes a repository that is served as files.
func (s *siteOutside) git(w *world) {
	w.t.Helper()
	git := func(args ...string) {
		w.t.Helper()
		cmd := exec.CommandContext(w.t.Context(), meshtest.Need(w.t, "git"), args...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "GIT_CONFIG_NOSYSTEM=1"}
		if r := ran(w.t, cmd); r.Code != 0 {
			w.t.Fatalf("git %v: %s", args, r.Output)
		}
	}
	work, bare := w.path("work"), filepath.Join(s.dir, "repo.git")
	git("init", "-q", work)
	w.put(filepath.Join(work, "README"), "the readme\n")
	git("-C", work, "add", "README")
	git("-C", work, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "-m", "x")
	git("clone", "-q", "--bare", work, bare)
	git("-C", bare, "update-server-info")
}

// debian makes a flat repository of one package, which nobody unpacks.
func (s *siteOutside) debian(w *world) {
	w.t.Helper()
	deb := []byte("no real package\n")
	dir := filepath.Join(s.dir, "debian")
	index := fmt.Sprintf("Package: sallyport-hello\nVersion: 1.0\nArchitecture: all\nMaintainer: x <x@x>\nFilename: ./hello.deb\nSize: %d\nSHA256: %x\nDescription: x\n\n", len(deb), sha256.Sum256(deb))
	err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "hello.deb"), deb, 0o644), os.WriteFile(filepath.Join(dir, "Packages"), []byte(index), 0o644))
	if err != nil {
		w.t.Fatal(err)
	}
}

// module makes what a proxy of Go modules serves (go.dev/ref/mod).
func (s *siteOutside) module(w *world) {
	w.t.Helper()
	const mod = "module acme.test/hello\n\ngo 1.21\n"
	dir := filepath.Join(s.dir, "go", "acme.test", "hello", "@v")
	var packed bytes.Buffer
	z := zip.NewWriter(&packed)
	for name, text := range map[string]string{"go.mod": mod, "hello.go": "// Package hello is there.\npackage hello\n"} {
		f, err := z.Create("acme.test/hello@v1.0.0/" + name)
		if err == nil {
			_, err = io.WriteString(f, text)
		}
		if err != nil {
			w.t.Fatal(err)
		}
	}
	errs := []error{z.Close(), os.MkdirAll(dir, 0o755)}
	for name, text := range map[string]string{"list": "v1.0.0\n", "v1.0.0.info": `{"Version":"v1.0.0"}`, "v1.0.0.mod": mod, "v1.0.0.zip": packed.String()} {
		errs = append(errs, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	if err := errors.Join(errs...); err != nil {
		w.t.Fatal(err)
	}
}

// wheel makes an index of one package of Python (PEP 503).
func (s *siteOutside) wheel(w *world) {
	w.t.Helper()
	const info = "sallyport_hello-1.0.dist-info/"
	var packed bytes.Buffer
	z := zip.NewWriter(&packed)
	for _, f := range [][2]string{
		{"sallyport_hello.py", "print('hello of pip')\n"}, {info + "METADATA", "Metadata-Version: 2.1\nName: sallyport-hello\nVersion: 1.0\n"},
		{info + "WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"},
		{info + "RECORD", "sallyport_hello.py,,\n" + info + "METADATA,,\n" + info + "WHEEL,,\n" + info + "RECORD,,\n"},
	} {
		to, err := z.Create(f[0])
		if err == nil {
			_, err = io.WriteString(to, f[1])
		}
		if err != nil {
			w.t.Fatal(err)
		}
	}
	const name = "sallyport_hello-1.0-py3-none-any.whl"
	dir := filepath.Join(s.dir, "simple", "sallyport-hello")
	err := errors.Join(z.Close(), os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, name), packed.Bytes(), 0o644),
		os.WriteFile(filepath.Join(dir, "index.html"), []byte("<!DOCTYPE html><a href="+name+">"+name+"</a>\n"), 0o644))
	if err != nil {
		w.t.Fatal(err)
	}
}

// tarball makes a registry of one package of Node.
func (s *siteOutside) tarball(w *world) {
	w.t.Helper()
	const manifest = `{"name":"sallyport-hello","version":"1.0.0","main":"hello.js"}`
	var packed bytes.Buffer
	zipped := gzip.NewWriter(&packed)
	files := tar.NewWriter(zipped)
	for _, f := range [][2]string{{"package/package.json", manifest}, {"package/hello.js", "console.log('hello of npm')\n"}} {
		err := files.WriteHeader(&tar.Header{Name: f[0], Mode: 0o644, Size: int64(len(f[1]))})
		if err == nil {
			_, err = io.WriteString(files, f[1])
		}
		if err != nil {
			w.t.Fatal(err)
		}
	}
	dir := filepath.Join(s.dir, "npm")
	if err := errors.Join(files.Close(), zipped.Close(), os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "hello.tgz"), packed.Bytes(), 0o644)); err != nil {
		w.t.Fatal(err)
	}
	sum := sha512.Sum512(packed.Bytes())
	index := fmt.Sprintf(`{"name":"sallyport-hello","dist-tags":{"latest":"1.0.0"},"versions":{"1.0.0":{"name":"sallyport-hello","version":"1.0.0","dist":{"tarball":"https://%s/npm/hello.tgz","integrity":"sha512-%s"}}}}`,
		softwareHost, base64.StdEncoding.EncodeToString(sum[:]))
	if err := os.WriteFile(filepath.Join(dir, "sallyport-hello"), []byte(index), 0o644); err != nil {
		w.t.Fatal(err)
	}
}

// roleHealth has this program ask a server of gRPC how it is.
const roleHealth = "health"

// askHealth is told the file of an authority, "-" for HTTP/2 in the clear, the
// target, and perhaps the name of the host where that is a proxy.
func askHealth() int {
	creds := insecure.NewCredentials()
	var err error
	if os.Args[1] != "-" {
		creds, err = credentials.NewClientTLSFromFile(os.Args[1], "")
	}
	options := []grpc.DialOption{grpc.WithTransportCredentials(creds)}
	if len(os.Args) > 3 {
		options = append(options, grpc.WithAuthority(os.Args[3]))
	}
	if err == nil {
		err = healthOf(os.Args[2], options...)
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// healthOf asks in one message, and for a stream of them.
func healthOf(target string, options ...grpc.DialOption) error {
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	cc, err := grpc.NewClient(target, options...)
	if err != nil {
		return err
	}
	defer cc.Close()
	client := grpc_health_v1.NewHealthClient(cc)
	r, err := client.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return err
	}
	watch, err := client.Watch(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return err
	}
	first, err := watch.Recv()
	if err != nil {
		return err
	}
	fmt.Println(r.GetStatus(), first.GetStatus())
	return nil
}

// A flow is a way by which programs come to the gateway: what they are told, and
// nothing else.
type flow struct {
	name string
	env  []string
	// dns says that names are looked up, and leads to what the policy has for them.
	dns bool
}

// A software is an ordinary program and what it is to say.
type software struct {
	name  string
	args  []string
	env   []string
	want  string
	flows []string
}

const (
	byDNS, byProxy, bySocks, byGateway = "dns", "proxy", "socks", "gateway"
)

// ordinaryPrograms are the command lines that know nothing of us.
func ordinaryPrograms(w *world, s *siteOutside, gateway, program string) []software {
	t := w.t
	const page = "the page of " + softwareHost
	url := "https://" + softwareHost
	python := meshtest.Need(t, "/usr/bin/python3")
	if command(t, python, "-c", "import requests").Code != 0 {
		meshtest.Missing(t, "python3-requests")
	}
	if command(t, python, "-c", "import pip").Code != 0 {
		meshtest.Missing(t, "python3-pip")
	}
	svid := w.path("stolen-payment")
	list := []software{
		{"curl", []string{"curl", "-sS", "--max-time", "20", "--cacert", s.ca, url + "/v1"}, nil, page, []string{byDNS, byProxy, bySocks}},
		{
			"curl to the gateway",
			[]string{"curl", "-sS", "--max-time", "20", "--cacert", s.ca, "--proxy", "https://" + gateway, "--proxy-insecure", "--proxy-cert", svid + "/svid.pem", "--proxy-key", svid + "/key.pem", url + "/v1"},
			nil, page, []string{byGateway},
		},
		{"wget", []string{meshtest.Need(t, "wget"), "-q", "-O", "-", "--ca-certificate=" + s.ca, "--tries=1", url + "/v1"}, nil, page, []string{byDNS, byProxy}},
		{"git", []string{"sh", "-c", "git clone -q " + url + "/repo.git copy && cat copy/README"}, []string{"GIT_SSL_CAINFO=" + s.ca}, "the readme", []string{byDNS, byProxy, bySocks}},
		{
			"openssl s_client",
			[]string{"sh", "-c", `printf 'GET /v1 HTTP/1.0\r\nHost: ` + softwareHost + `\r\n\r\n' | openssl s_client -quiet -verify_return_error -CAfile "$1" $(test -z "$PROXY" || echo -proxy "$PROXY") -connect ` + softwareHost + ":443", "sh", s.ca},
			nil, page, []string{byDNS, byProxy},
		},
		{"python urllib", []string{python, "-c", "import urllib.request as u; print(u.urlopen('" + url + "/v1').read().decode())"}, []string{"SSL_CERT_FILE=" + s.ca}, page, []string{byDNS, byProxy}},
		{"python requests", []string{python, "-c", "import requests; print(requests.get('" + url + "/v1').text)"}, []string{"REQUESTS_CA_BUNDLE=" + s.ca}, page, []string{byDNS, byProxy}},
		{"node", []string{meshtest.Need(t, "node"), "-e", `require("https").get("` + url + `/v1",r=>r.pipe(process.stdout)).on("error",e=>{console.error(e);process.exit(1)})`}, []string{"NODE_EXTRA_CA_CERTS=" + s.ca}, page, []string{byDNS}},
		{
			"go get",
			[]string{"sh", "-c", "go mod init acme.test/mine && go get acme.test/hello && cat go.mod"},
			[]string{"GOPROXY=" + url + "/go", "GOSUMDB=off", "GOFLAGS=-mod=mod", "GOTOOLCHAIN=local", "SSL_CERT_FILE=" + s.ca}, "acme.test/hello v1.0.0", []string{byDNS, byProxy, bySocks},
		},
		{"grpc-go", []string{program, s.ca, softwareHost + ":443"}, []string{envRole + "=" + roleHealth}, "SERVING SERVING", []string{byDNS, byProxy}},
		{"grpc-go in the clear", []string{program, "-", clearHost + ":80"}, []string{envRole + "=" + roleHealth}, "SERVING SERVING", []string{byDNS, byProxy}},
		{"grpc-go to the proxy", []string{program, "-", "127.0.0.1:15001", clearHost}, []string{envRole + "=" + roleHealth}, "SERVING SERVING", []string{byProxy}},
		{"curl in the clear", []string{"curl", "-sS", "--max-time", "20", "http://" + clearHost + "/v1"}, nil, "the page of " + clearHost, []string{byDNS}},
		{
			"pip",
			[]string{"sh", "-c", `"$0" -m pip install -q --target lib --index-url "$1" sallyport-hello && PYTHONPATH=lib "$0" -m sallyport_hello`, python, url + "/simple"},
			[]string{"PIP_CERT=" + s.ca, "PIP_NO_CACHE_DIR=1", "PIP_DISABLE_PIP_VERSION_CHECK=1", "PIP_RETRIES=0"}, "hello of pip", []string{byProxy},
		},
		{
			"chromium",
			[]string{"sh", "-c", `"$0" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir="$HOME/chromium" --ignore-certificate-errors-spki-list="$1" ${PROXY:+--proxy-server="$PROXY"} --dump-dom "$2" 2>/dev/null`, meshtest.Need(t, "chromium"), s.pin, url + "/v1"},
			nil, page, []string{byDNS, byProxy},
		},
		{"psql", []string{meshtest.Need(t, "psql"), "-h", databaseHost, "-U", "postgres", "-Atc", "select 6*7"}, nil, "42", []string{byDNS}},
		{"apt-get", []string{"sh", "-c", aptScript, "sh", s.ca, url + "/debian"}, nil, "no real package", []string{byDNS, byProxy}},
	}
	// These are large: who lacks them tries the others, but not in CI. They take
	// long, so that each goes by one flow.
	here := func(program string) bool {
		_, err := exec.LookPath(program)
		if err != nil && os.Getenv("CI") == "true" {
			meshtest.Missing(t, program)
		}
		return err == nil
	}
	if here("npm") {
		list = append(list, software{
			"npm", []string{"sh", "-c", `npm install --silent --registry "$0" sallyport-hello && node -e 'require("sallyport-hello")'`, url + "/npm/"},
			[]string{"npm_config_cafile=" + s.ca, "npm_config_audit=false", "npm_config_fund=false", "npm_config_update_notifier=false", "npm_config_fetch_retries=0"}, "hello of npm", []string{byProxy},
		})
	}
	if here("javac") { // java runs source by it
		w.put(w.path("Ask.java"), askJava)
		if err := os.Chmod(w.path("Ask.java"), 0o644); err != nil {
			t.Fatal(err)
		}
		list = append(list, software{
			"java", []string{"sh", "-c", `java -XX:TieredStopAtLevel=1 "$0" "$1" "$2"`, w.path("Ask.java"), s.ca, url + "/v1"},
			nil, page, []string{byDNS},
		})
	}
	return list
}

// askJava asks by the client of HTTP that Java has, which trusts a file.
const askJava = `import java.net.*;
import java.net.http.*;
import java.nio.file.*;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import javax.net.ssl.*;

class Ask {
	public static void main(String[] args) throws Exception {
		KeyStore store = KeyStore.getInstance(KeyStore.getDefaultType());
		store.load(null);
		store.setCertificateEntry("site", CertificateFactory.getInstance("X.509").generateCertificate(Files.newInputStream(Path.of(args[0]))));
		TrustManagerFactory trusted = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
		trusted.init(store);
		SSLContext tls = SSLContext.getInstance("TLS");
		tls.init(null, trusted.getTrustManagers(), null);
		HttpClient client = HttpClient.newBuilder().sslContext(tls).build();
		System.out.println(client.send(HttpRequest.newBuilder(URI.create(args[1])).build(), HttpResponse.BodyHandlers.ofString()).body());
		System.exit(0);
	}
}
`

// aptScript updates the index of a repository and takes a package from it, in a
// folder of its own.
const aptScript = `set -e
mkdir -p lists/partial cache/archives/partial etc
: >status
echo "deb [trusted=yes] $2 ./" >etc/sources.list
o="-qq -o Dir=$PWD -o Dir::State=$PWD -o Dir::State::status=$PWD/status -o Dir::State::lists=$PWD/lists -o Dir::Cache=$PWD/cache -o Dir::Etc=$PWD/etc"
o="$o -o APT::Sandbox::User= -o Acquire::https::CAInfo=$1 -o Acquire::AllowInsecureRepositories=true -o Acquire::Languages=none -o Acquire::Retries=0"
apt-get $o update
apt-get $o download sallyport-hello
cat *.deb
`

// TestEgressSoftware has ordinary programs reach a host outside through each flow
// that they know, none of them told of more than any proxy would have them told.
func TestEgressSoftware(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	w := namesWorld(t)
	site, db := w.startSite(), besideSocket(t, postgrestest.Start(t).Socket())
	w.extend("egress.yaml", fmt.Sprintf("  - host: %s\n    ech: allow-grease\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q]}\n  - host: %s\n    proto: tcp\n    private: [127.0.0.1/32]\n    route: {endpoints: [%q]}\n", softwareHost, site.addr, databaseHost, db))
	clearOne := outside{Server: &httptest.Server{URL: "https://" + site.addr}, ca: site.clearCA}
	w.extend("egress.yaml", clearOne.originated(clearHost)+"    alpn: [h2, http/1.1]\n")
	w.extend("access.csv", softwareRows)
	program := w.path("workload")
	self, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = errors.Join(os.Chmod(w.dir, 0o755), os.Chmod(site.ca, 0o644), os.WriteFile(program, self, 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	w.steal("payment")
	for _, f := range []string{"stolen-payment", "stolen-payment/svid.pem", "stolen-payment/key.pem"} {
		if err := os.Chmod(w.path(f), 0o755); err != nil { //nolint:gosec // keys of a test
			t.Fatal(err)
		}
	}
	const proxy = "127.0.0.1:15001"
	flows := []flow{
		{name: byDNS, dns: true},
		{name: byProxy, env: []string{"HTTPS_PROXY=http://" + proxy, "https_proxy=http://" + proxy, "PROXY=" + proxy}},
		{name: bySocks, env: []string{"HTTPS_PROXY=socks5h://" + proxy, "https_proxy=socks5h://" + proxy}},
		{name: byGateway},
	}
	w.await("reach the host", func() bool {
		return w.resolving(curl("--cacert", site.ca, "https://"+softwareHost+"/v1")...).Code == 0
	})
	runs := 0
	for _, p := range ordinaryPrograms(w.world, site, w.gateway, program) {
		for _, f := range flows {
			if !slices.Contains(p.flows, f.name) {
				continue
			}
			runs++
			t.Run(p.name+" by "+f.name, func(t *testing.T) {
				t.Parallel()
				if r := w.ordinarily(t, f, p); r.Code != 0 || !strings.Contains(r.Output, p.want) {
					t.Errorf("it ends with %d and says %q, want %q", r.Code, r.Output, p.want)
				}
			})
		}
	}
	t.Logf("%d programs, each by the flows that it knows", runs)
}

// ordinarily runs a program as the workload, in a folder of its own.
func (w *world) ordinarily(t *testing.T, f flow, p software) runReply {
	t.Helper()
	home, err := os.MkdirTemp(w.dir, "home-")
	if err == nil {
		err = os.Chown(home, workloadUID, workloadUID)
	}
	if err != nil {
		t.Fatal(err)
	}
	uid := strconv.Itoa(workloadUID)
	script := `u=$1 && shift && cd "$HOME" && exec setpriv --reuid "$u" --regid "$u" --clear-groups -- "$@"`
	if f.dns {
		script = fmt.Sprintf("mount --bind %s /etc/resolv.conf && mount --bind %s /etc/nsswitch.conf && ", w.path("resolv.conf"), w.path("nsswitch.conf")) + script
	}
	cmd := exec.CommandContext(t.Context(), "unshare", append([]string{"-m", "sh", "-c", script, "sh", uid}, p.args...)...)
	goBin := filepath.Dir(meshtest.Need(t, "go"))
	cmd.Env = slices.Concat([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin:" + goBin, "HOME=" + home, "LC_ALL=C.UTF-8"}, f.env, p.env)
	return ran(t, cmd)
}
