package rig

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
)

// Nginx writes the configuration of one half of a pair of nginx. What keeps a
// connection and the rest of the section http are the caller's.
func (g *Ground) Nginx(name string, workers int, rest string) (string, error) {
	home := filepath.Join(g.Dir, name)
	if err := os.MkdirAll(home, 0o700); err != nil {
		return "", err
	}
	return g.File(name+".conf", fmt.Sprintf(`daemon off;
worker_processes %d;
pid %s/pid;
error_log %s/error.log;
events { worker_connections 8192; multi_accept on; }
http {
  access_log off;
  client_body_temp_path %s/b; proxy_temp_path %s/p; fastcgi_temp_path %s/f; uwsgi_temp_path %s/u; scgi_temp_path %s/s;
  keepalive_timeout 300; keepalive_requests 100000000;
  %s
}
`, workers, home, home, home, home, home, home, home, rest))
}

// HAProxy writes the configuration of one half of a pair of HAProxy.
func (g *Ground) HAProxy(name string, threads int, rest string) (string, error) {
	return g.File(name+".cfg", fmt.Sprintf(`global
  nbthread %d
  maxconn 8000
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
defaults
  mode http
  timeout client 300s
  timeout server 300s
  timeout connect 5s
  timeout http-keep-alive 300s
  http-reuse always
%s`, threads, rest))
}

// Reverse is one half of a pair of net/http/httputil.ReverseProxy, given a folder
// of a Ground, where to listen and where to: towards https it is the client's. How
// says what it speaks.
func Reverse(how func(*http.Server, *http.Transport)) Role {
	return func(args []string) error {
		if len(args) != 3 {
			return fmt.Errorf("%d arguments, want a folder, where to listen and where to", len(args))
		}
		dir, listen, to := args[0], args[1], args[2]
		u, err := url.Parse(to)
		if err != nil {
			return err
		}
		near := u.Scheme == "https"
		half := "server"
		if near {
			half = "client"
		}
		cert, err := tls.LoadX509KeyPair(filepath.Join(dir, half+".pem"), filepath.Join(dir, half+".pem"))
		if err != nil {
			return err
		}
		ca, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
		if err != nil {
			return err
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(ca)
		conf := &tls.Config{
			MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, RootCAs: roots, ClientCAs: roots,
			ClientAuth: tls.RequireAndVerifyClientCert, ServerName: "server.bench.test",
		}
		tr := &http.Transport{TLSClientConfig: conf, DisableCompression: true}
		srv := &http.Server{Addr: listen, TLSConfig: conf, Handler: &httputil.ReverseProxy{
			Transport: tr,
			Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(u); r.Out.Host = r.In.Host },
		}}
		how(srv, tr)
		if near {
			return srv.ListenAndServe()
		}
		return srv.ListenAndServeTLS("", "")
	}
}
