package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"sallyport/internal/scripttest"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"sidecar": main}) }

func TestScript(t *testing.T) { scripttest.Run(t, testscript.Params{}) }
