package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"sallyport/internal/daemon"
)

// localProxies are the admin sockets of proxies on this machine, where packages
// and sallyport join have them.
func localProxies() []string {
	packaged, _ := filepath.Glob(packagedProxies) // the patterns are good ones
	joined, _ := filepath.Glob(filepath.Join(defaultData, "*", "run", "admin.sock"))
	return slices.DeleteFunc(append(packaged, joined...), func(p string) bool {
		return strings.HasSuffix(strings.TrimSuffix(filepath.Dir(p), "/run"), "/issuer")
	})
}

// proxySocket finds the admin socket of a proxy by what people call it: the
// socket itself, or the name of the node.
func proxySocket(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	tried := []string{filepath.Join(defaultRun, name, "admin.sock"), filepath.Join(defaultData, name, "run", "admin.sock")}
	for _, p := range tried {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", usage(fmt.Errorf("no proxy of that name is here: neither %s; name its admin socket, such as /path/to/admin.sock", strings.Join(tried, " nor ")))
}

// askAdmin asks a program on its admin socket.
func askAdmin(ctx context.Context, within time.Duration, method, socket, path string) (status int, body []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	c := daemon.AdminClient(socket)
	defer c.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://admin"+path, nil)
	if err != nil {
		return 0, nil, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, 32<<20))
	return resp.StatusCode, body, err
}

// queryProxy asks a proxy on its admin socket and decodes what it answers.
func queryProxy(ctx context.Context, method, socket, path string, into any) error {
	status, body, err := askAdmin(ctx, 30*time.Second, method, socket, path)
	if err != nil {
		return daemon.Exit(daemon.Unreachable, err)
	}
	if status != http.StatusOK {
		said := strings.TrimSpace(string(body))
		if status == http.StatusNotFound && said == "404 page not found" {
			said = "what runs there is no sidecar, or of an older version"
		}
		return daemon.Exit(daemon.Failed, errors.New(said))
	}
	return json.Unmarshal(body, into)
}
