package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	// Only what ../../node-init.sh puts into the Corefile: CoreDNS's usual list of plugins brings the libraries of three clouds.
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/template"
)

// dns is CoreDNS. Plugins see a query in the order of this list.
func dns() {
	dnsserver.Directives = []string{"bind", "ready", "errors", "loadbalance", "template", "kubernetes"}
	coremain.Run()
}
